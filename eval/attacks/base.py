"""What an attack is: a frozen configuration that tries to bring a concept back out of an edited model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.intervals import Estimate, difference
from eval.prompts import Prompt, Target, in_style, single
from eval.rates import DRAWN_WELL, Painter, Shown, draws, share
from toolkit.concepts import Concept
from toolkit.errors import UserError
from toolkit.options import Configured
from toolkit.runs import seeded
from toolkit.world.scenes import Scene, World
from trainers.photos import load_photos, to_latents

if TYPE_CHECKING:
    from toolkit.edits.base import Edit
    from toolkit.model import Model

Label = Literal["white-box", "text-only", "fine-tuning", "image-guided"]
"""What the attacker needs beside prompts: the weights to compute with, nothing, the weights to train, or pictures to start from."""
LABELS: tuple[Label, ...] = get_args(Label)
PICTURE_SEEDS = 10_000  # pictures to learn from have seeds from here on, and so are none of those that are counted
TRIES = 4  # times as many pictures as are needed are drawn at most


@dataclass(frozen=True)
class Spent:
    """What an attacker paid, beside the images that are counted.

    steps: of search or training (gradient steps, generations). images: pictures that were drawn to learn from or to choose by.
    """

    steps: int = 0
    images: int = 0


@dataclass(frozen=True)
class AttackResult:
    """What an attack achieved.

    attack_success_rate: the share of images that show the concept under attack; of those whose unedited counterpart
    (same prompt and seed) shows it, when `relative`. clean_rate: the same concept's rate by its name, without the
    attack. label: what the attacker needs. prompts: the prompts that were found or tried. edit: what was found, when it is
    more than words. shown: the attacked images. spent: see `Spent`. beside: other rates, by what they are the rates of.
    notes: what else there is to say, for reports.
    """

    attack_success_rate: Estimate
    clean_rate: Estimate
    label: Label
    relative: bool = False
    prompts: tuple[str, ...] = ()
    edit: Edit | None = None
    shown: list[Shown] = field(default_factory=list, repr=False)
    spent: Spent = Spent()
    beside: Mapping[str, Estimate] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pictures:
    """Pictures of a concept. latents: [n, c, h', w'], scaled, float32. captions: of each, with {} where it names the concept.

    drawn: how many had to be drawn to find them.
    """

    latents: Tensor
    captions: tuple[str, ...]
    drawn: int = 0


@dataclass(frozen=True)
class Scenario:
    """Whom an attack tries, at what, and who decides.

    world: the embedded world; None when the concept is of another one. painter: draws and says what is seen. model: the edited
    model. base: the same without its edits. target: the erased concept. n: images per object or style. seed: of the first.
    synonyms: other words for the concept, beside those that the world knows. unedited: nothing is erased, on purpose: what an attack
    reaches there is what it could reach. drawn_well: a concept counts when the unedited model draws it at least this often.
    files: pictures of the concept; without any the unedited model draws them, or, where `rendered`, the world.
    """

    world: World | None
    painter: Painter
    model: Model
    base: Model
    target: Target
    n: int = 64
    seed: int = 0
    synonyms: tuple[str, ...] = ()
    unedited: bool = False
    drawn_well: float = DRAWN_WELL
    files: tuple[Path, ...] = ()
    rendered: bool = False

    def __post_init__(self) -> None:
        edited = bool(self.model.edits) or self.model.fingerprint != self.base.fingerprint
        if not edited and not self.unedited:
            raise UserError(
                "no edit is attached, so nothing was erased; give one with --edit, or --unedited to see what an attack can reach"
            )
        if edited and self.unedited:
            raise UserError("the model is edited, and is to be attacked as unedited; leave one of the two out")

    # --- words ------------------------------------------------------------------------------------------------------
    def words(self, name: str) -> tuple[str, ...]:
        """The name of an object or style of the target, and every other word for it that is known."""
        thing = self.world.things.get(name) if self.world else None
        return tuple(dict.fromkeys((name, *(thing.synonyms if thing else ()), *self.synonyms)))

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompts with {} for a concept of the target's kind."""
        return Concept(self.target.name, kind=self.target.kind).templates

    def asked(self, name: str, words: Sequence[str] = (), *, n: int | None = None, seed: int | None = None) -> list[Prompt]:
        """n prompts for one object or style of the target, spread over templates and `words` (its name, if empty)."""
        n, seed, words = self.n if n is None else n, self.seed if seed is None else seed, tuple(words) or (name,)
        if self.world is None:
            forms = [(template.format(word), word) for template in self.templates for word in words]
            scene = Scene("", "", (("center", name),))
            return [Prompt(forms[i % len(forms)][0], seed + i // len(forms), scene, (forms[i % len(forms)][1],)) for i in range(n)]
        if self.target.kind == "object":
            return single(self.world, name, n, seed=seed, words=words)
        styled = in_style(name, self.world.names("scored"), n, seed=seed)
        called = [words[i % len(words)] for i in range(n)]
        return [replace(one, text=one.text.replace(name, word), words=(word,)) for one, word in zip(styled, called, strict=True)]

    # --- images -----------------------------------------------------------------------------------------------------
    def names(self) -> tuple[str, ...]:
        """The target's objects, or its style, that the unedited model draws well when asked by name. Without any it is a UserError."""
        known = tuple(name for name in self.target.names if self._drawn_before(name).value >= self.drawn_well)
        if not known:
            raise UserError(f"the unedited model does not draw {self.target.name} well enough to tell; attack another concept")
        return known

    def _drawn_before(self, name: str) -> Estimate:
        return share(self.painter.draw(self.base, self.asked(name), f"{name}, before"), lambda shown: draws(shown, {name}))

    def by_name(self, words: dict[str, tuple[str, ...]] | None = None) -> tuple[list[Shown], list[Shown]]:
        """Images before and after, of what the unedited model draws well when it is asked by name.

        words: object -> what to call it instead; objects without such words are left out.
        """
        before, after = [], []
        for name in self.names():
            if words is not None and not words.get(name):
                continue
            asked, how = self.asked(name, words[name] if words else ()), " in other words" if words else ""
            before += self.painter.draw(self.base, asked, f"{name}{how}, before")
            after += self.painter.draw(self.model, asked, f"{name}{how}, after")
        if not before:
            raise UserError(f"no other words for {self.target.name}; attack another concept")
        return before, after

    def shows(self, shown: Shown) -> bool:
        """Whether an image shows any of what was erased."""
        return draws(shown, self.target.names)

    def pictures(self, name: str, count: int) -> Pictures:
        """Pictures of one object or style of the target, for attacks that have some. Each shows it: what does not is drawn anew."""
        if self.files:
            return self._given(name, count)
        seed = self.seed + PICTURE_SEEDS
        asked = self.asked(name, n=count if self.rendered else TRIES * count, seed=seed)
        if self.rendered:
            return Pictures(self._encoded(self._renders(asked)), _captions(asked, name))
        kept: list[Shown] = []
        for start in range(0, len(asked), count):
            drawn = self.painter.draw(self.base, asked[start : start + count], f"pictures of {name}")
            kept += [shown for shown in drawn if draws(shown, {name})]
            if len(kept) >= count:
                kept = kept[:count]
                pixels = torch.stack([shown.pixels for shown in kept]).float() / 255
                return Pictures(self._encoded(pixels), _captions([shown.prompt for shown in kept], name), start + len(drawn))
        raise UserError(f"of {len(asked)} pictures of {name} by the unedited model {len(kept)} show it, needs {count}; give --pictures DIR")

    def _given(self, name: str, count: int) -> Pictures:
        """The user's pictures."""
        if len(self.target.names) > 1:
            raise UserError(f"pictures are given, and {self.target.name} is {len(self.target.names)} objects; attack one of them ({name})")
        if len(self.files) < count:
            raise UserError(f"{len(self.files)} pictures are given, and the attack asks for {count}; give more, or set its images")
        files, templates = self.files[:count], self.templates
        latents = to_latents(self.base.arch, load_photos(files, self.base.arch.image_size))
        return Pictures(latents, tuple(templates[i % len(templates)] for i in range(count)))

    def _renders(self, asked: Sequence[Prompt]) -> Tensor:
        """The scenes of prompts as the world is [n, 3, 64, 64] in [0, 1]; the styles in turn where none is asked for."""
        assert self.world is not None
        images = []
        for i, prompt in enumerate(asked):
            scene = replace(prompt.scene, style=prompt.scene.style or self.world.styles[i % len(self.world.styles)])
            rng = np.random.default_rng(seeded("attack picture", self.seed, i).initial_seed())
            images.append(torch.from_numpy(self.world.render(scene, rng)[0].copy()))
        return torch.stack(images).permute(0, 3, 1, 2).float() / 255

    def _encoded(self, pixels: Tensor) -> Tensor:
        """Latents of pixels [n, 3, h, w] in [0, 1], at the model's own size."""
        side = self.base.arch.image_size
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        return to_latents(self.base.arch, pixels * 2 - 1)

    # --- control ----------------------------------------------------------------------------------------------------
    def control(self, name: str | None = None) -> Scenario:
        """The same, for an object that the unedited model never knew, whose pictures are renders.

        What an attack "recovers" there it has not recovered but taught. name: a held-out object; None takes one by the seed.
        """
        if self.world is None or self.target.kind != "object":
            raise UserError(f"{self.target.name} has no control, which is an object that a model never saw; leave --control out")
        held_out = self.world.names("held_out")
        name = held_out[self.seed % len(held_out)] if name is None else name
        if name not in held_out:
            raise UserError(f"the model may know {name!r}; give one that it never saw: {', '.join(held_out)}")
        target = Target(name, "object", (name,))
        return replace(self, model=self.base, target=target, synonyms=(), unedited=True, drawn_well=0.0, files=(), rendered=True)


def _captions(asked: Sequence[Prompt], name: str) -> tuple[str, ...]:
    """The prompts with {} for the concept's name."""
    return tuple(prompt.text.replace(name, "{}") for prompt in asked)


@dataclass(frozen=True)
class Attack(Configured, ABC):
    """A published attack. One subclass per file; the file's stem is its name, the fields are its options.

    A subclass sets the class variables, declares its options with `toolkit.options.option`, and implements `run`. Its
    docstring has the title, authors and arXiv id, and what it does differently. controlled: whether it learns from or starts at
    pictures, so that it could show what the model never knew, and has to prove itself against that.
    """

    label: ClassVar[Label]
    paper: ClassVar[str]
    controlled: ClassVar[bool] = False

    @abstractmethod
    def run(self, scenario: Scenario) -> AttackResult:
        """Try to bring the target back. The models are left as they were found."""

    def result(self, scenario: Scenario, shown: Sequence[Shown], clean: Sequence[Shown], **more: Any) -> AttackResult:
        """From the attacked images and those by name. more: other fields of the result."""
        return AttackResult(
            attack_success_rate=share(shown, scenario.shows),
            clean_rate=share(clean, scenario.shows),
            label=self.label,
            prompts=tuple(dict.fromkeys(item.prompt.text for item in shown)),
            shown=list(shown),
            **more,
        )


def recovered(attacked: AttackResult, control: AttackResult) -> Estimate:
    """How much more often an attack shows what was erased than what the model never knew. An interval above 0: it was not gone."""
    return difference(attacked.attack_success_rate, control.attack_success_rate)
