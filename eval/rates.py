"""What a model draws, as the oracle reads it, and the rates that follow from it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eval.intervals import NOTHING, Estimate, rate, ratio
from eval.prompts import Prompt
from toolkit.runs import computes_in_bf16, progress
from toolkit.sample import Hook, sample
from toolkit.world.oracle import NONE, Oracle, Reading

if TYPE_CHECKING:
    from toolkit.model import Model

DRAWN_WELL = 0.8  # a concept counts when the unedited model draws it right at least this often


@dataclass(frozen=True)
class Shown:
    """One image: what was asked for, what the oracle reads, and the pixels [3, h, w] uint8."""

    prompt: Prompt
    reading: Reading
    pixels: Tensor

    @property
    def drawn(self) -> set[str]:
        """Names of the objects in the image."""
        return set(self.reading.present().values())


@dataclass
class Painter:
    """Draws prompts and reads the images. What was drawn once is kept, so the unedited model draws each prompt once.

    amp: bfloat16 autocast; None is wherever the hardware computes in it. batch_size: None is the sampler's own.
    """

    oracle: Oracle
    steps: int = 12
    guidance: float = 2.0
    batch_size: int | None = None
    amp: bool | None = None
    _kept: dict[Any, Shown] = field(default_factory=dict, repr=False)

    def draw(self, model: Model, prompts: Sequence[Prompt], title: str = "draw", hooks: Sequence[Hook] = ()) -> list[Shown]:
        """The image of every prompt, in their order. hooks: for the sampler; what is drawn with them is not kept."""
        if hooks:
            return self._paint(model, prompts, title, hooks)
        keys = [(model, model.edits, prompt) for prompt in prompts]
        new = [prompt for key, prompt in dict(zip(keys, prompts, strict=True)).items() if key not in self._kept]
        for shown in self._paint(model, new, title, ()):
            self._kept[model, model.edits, shown.prompt] = shown
        return [self._kept[key] for key in keys]

    def _paint(self, model: Model, prompts: Sequence[Prompt], title: str, hooks: Sequence[Hook]) -> list[Shown]:
        if not prompts:
            return []
        with progress(title) as show:
            images = sample(
                model,
                [prompt.text for prompt in prompts],
                [prompt.seed for prompt in prompts],
                steps=self.steps,
                guidance=self.guidance,
                hooks=hooks,
                batch_size=self.batch_size,
                progress=show,
                amp=computes_in_bf16(model.arch.device.type) if self.amp is None else self.amp,
            )
        pixels = (images * 255).round().byte()
        readings = self.read(pixels.float() / 255)
        return [Shown(*row) for row in zip(prompts, readings, pixels, strict=True)]

    def read(self, images: Tensor) -> list[Reading]:
        """What images [n, 3, h, w] in [0, 1] show."""
        return self.oracle.read(images)

    def measured_by(self) -> dict[str, Any]:
        """What a rate was measured with, for reports."""
        return {
            "model": "oracle",
            "version": version(self.oracle),
            "threshold": self.oracle.threshold,
            "steps": self.steps,
            "guidance": self.guidance,
        }


def version(module: torch.nn.Module) -> str:
    """A short hash of a module's weights."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- of one image -----------------------------------------------------------------------------------------------------
def object_right(shown: Shown) -> bool:
    """Every object asked for is drawn, anywhere; nothing at all when none was asked for."""
    return shown.drawn.issuperset(shown.prompt.names) if shown.prompt.names else not shown.drawn


def place_right(shown: Shown) -> bool:
    """Every object asked for is drawn at the place asked for."""
    return all(shown.reading.objects[place] == name for place, name in shown.prompt.scene.items)


def style_right(shown: Shown) -> bool | None:
    """Whatever is drawn has the style asked for; None when no style was asked for. Nothing drawn is wrong."""
    if not shown.prompt.scene.style:
        return None
    return set(shown.reading.styles.values()) == {shown.prompt.scene.style}


def background_right(shown: Shown) -> bool:
    """The background has the colour asked for."""
    return shown.reading.background == shown.prompt.scene.background


def draws(shown: Shown, erased: Collection[str]) -> bool:
    """Whether any of the erased objects is drawn anywhere, or anything in one of the erased styles."""
    return not (shown.drawn | set(shown.reading.styles.values())).isdisjoint(erased)


def instead(shown: Shown, erased: Collection[str], anchor: str | None = None) -> str:
    """What an image shows in place of what was erased.

    "erased": it is still there. "anchor". "none": no object on a readable background. "other": one other object, and
    a readable background. "unclear": anything else.
    """
    if draws(shown, erased):
        return "erased"
    if shown.reading.background == NONE or len(shown.drawn) > 1:
        return "unclear"
    if anchor is not None and shown.drawn == {anchor}:
        return "anchor"
    return "other" if shown.drawn else "none"


# --- of many ----------------------------------------------------------------------------------------------------------
def share(shown: Sequence[Shown], test: Callable[[Shown], bool | None]) -> Estimate:
    """How many images pass a test, clustered by prompt; images for which it says None do not count."""
    results = [(result, item.prompt.text) for item in shown if (result := test(item)) is not None]
    return rate([result for result, _ in results], [text for _, text in results])


def target_accuracy(shown: Sequence[Shown], erased: Collection[str]) -> Estimate:
    """The share of images in which an erased object (any of them) or style is still drawn."""
    return share(shown, lambda item: draws(item, erased))


def relative(before: Sequence[Shown], after: Sequence[Shown], test: Callable[[Shown], bool | None]) -> Estimate:
    """How many images pass a test after an edit, relative to before, on the same prompts and seeds."""
    check_paired(before, after)
    pairs = [(test(a), test(b), b.prompt.text) for a, b in zip(after, before, strict=True)]
    kept = [(bool(a), bool(b), text) for a, b, text in pairs if a is not None and b is not None]
    if not kept:
        return NOTHING
    second, first, texts = zip(*kept, strict=True)
    return ratio(second, first, texts)


def check_paired(before: Sequence[Shown], after: Sequence[Shown]) -> None:
    """Comparing different prompts or seeds would compare nothing: a ValueError."""
    if [item.prompt for item in before] != [item.prompt for item in after]:
        raise ValueError("before and after were drawn from different prompts or seeds")


def by_object(shown: Sequence[Shown]) -> dict[str, list[Shown]]:
    """Single-object images by the object asked for."""
    groups: dict[str, list[Shown]] = {}
    for item in shown:
        groups.setdefault(item.prompt.names[0], []).append(item)
    return groups


def drawn_well(before: Sequence[Shown]) -> set[str]:
    """The objects that the unedited model draws right often enough for them to count."""
    return {name for name, items in by_object(before).items() if share(items, object_right).value >= DRAWN_WELL}


@dataclass(frozen=True)
class Retained:
    """What an edit left as it was; every estimate is after relative to before, on the same prompts and seeds.

    accuracy: objects right after, not relative. per_object: each object's ratio. Objects that the unedited model does
    not draw well are left out everywhere.
    """

    accuracy: Estimate
    objects: Estimate
    styles: Estimate
    backgrounds: Estimate
    per_object: Mapping[str, Estimate]

    @property
    def worst(self) -> tuple[str, Estimate]:
        """The object that lost most; ("", not measured) when none counts."""
        return min(self.per_object.items(), key=lambda item: item[1].value, default=("", NOTHING))


def retained(before: Sequence[Shown], after: Sequence[Shown]) -> Retained:
    """Compare single-object images of what should stay, drawn before and after an edit."""
    check_paired(before, after)
    counted = drawn_well(before)
    old = [item for item in before if item.prompt.names[0] in counted]
    new = [item for item in after if item.prompt.names[0] in counted]
    groups = by_object(new)
    return Retained(
        accuracy=share(new, object_right),
        objects=relative(old, new, object_right),
        styles=relative(old, new, style_right),
        backgrounds=relative(old, new, background_right),
        per_object={name: relative(items, groups[name], object_right) for name, items in by_object(old).items()},
    )


def drawn_instead(shown: Sequence[Shown], erased: Collection[str], anchor: str | None = None) -> dict[str, Estimate]:
    """What images that no longer show what was erased show: the share of each answer of `instead` but "erased"."""
    answers = [(instead(item, erased, anchor), item.prompt.text) for item in shown]
    texts = [text for answer, text in answers if answer != "erased"]
    kinds = ("none", "other", "anchor", "unclear") if anchor else ("none", "other", "unclear")
    return {kind: rate([answer == kind for answer, _ in answers if answer != "erased"], texts) for kind in kinds}


def most_drawn(shown: Sequence[Shown], erased: Collection[str]) -> list[tuple[str, int]]:
    """The other objects that appear most often in images that no longer show what was erased, with their counts."""
    found = Counter(name for item in shown if not draws(item, erased) for name in item.drawn)
    return found.most_common(3)
