"""What layers deep in a transformer read of a task's prompts: captured while the model draws, and solved layer by layer.

Joint attention changes the rows of the text from block to block, by the timestep and by the image. So there is no one change
of the rows for all layers, and what a layer reads must be seen. An anchor's prompt is drawn, and at each step the denoiser
reads the same noisy latents under the concept's prompt and under the empty one too: paired rows differ by the words alone.

The latents are the model's own on the way to the anchor's image. Noise alone is what a model reads at its first step only, and
the way to the concept's image is one that an edited model no longer goes: there the concept's prompt stands beside an image of
the anchor. The scheduler's steps are the timesteps at which a model is asked, and since the drawing needs the anchor's prediction
anyway, the concept costs one more. A preserved prompt is drawn for itself.

Rows are moved and kept as in rows.py, with two differences. In joint attention every row has read the whole prompt, as in an encoder
that is not causal, and BOS is no longer the same in every prompt: it moves to the anchor's. Where a layer reads the image's rows
behind the text's (Flux's single blocks share their keys and values), those of all prompts but the concept's are kept.

All layers are captured in one go, in the model as it is given. With the layers before it changed, a layer reads something else
than was captured; to solve one behind the other would take all drawings again for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines.closed_form.rows import KeepChoice, Placed, RowChoice, TaskPrompts, exact_device, fill
from toolkit.runs import progress
from toolkit.sample import Hook, State, sample
from toolkit.solve import Change, Sums, check_weights

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture
    from toolkit.arch.text import Text
    from toolkit.model import Model


@dataclass(frozen=True)
class Drawing:
    """A prompt that is drawn, and which of the text's rows are captured meanwhile.

    concept: the prompt that is read beside it, None beside a preserved prompt. source [n]: the rows of `concept` that move.
    target [n]: the rows of `prompt` that they go to. kept [m]: the rows of `prompt` that are kept.
    """

    prompt: str
    concept: str | None
    source: Tensor
    target: Tensor
    kept: Tensor


def captured_changes(
    model: Model,
    prompts: TaskPrompts,
    rows: RowChoice,
    preserve_rows: KeepChoice,
    *,
    erase_scale: float,
    preserve_scale: float,
    lamb: float,
    steps: int,
    images: int,
    seed: int,
) -> dict[str, Change]:
    """Reader (see `Architecture.text_readers`) -> the D of `closed_form` for what it reads in `model` as it is now.

    steps: timesteps of each drawing. images: drawings of each prompt, the first with the noise of `seed`. Rows weigh erase_scale
    and preserve_scale over steps * images, so that the mean over the latents is minimised; the empty prompt, which is read beside
    all drawings, has this weight for all of them together.

    Memory beside the model's: two d x d matrices in float64 for each reader, however many rows. Flux.1 has 57 readers of width
    3072, which take 8.6 GB; SD3 medium 24 of width 1536, 0.9 GB. From there to the edit it takes as much again three times over
    when more than d rows are moved, and little when they are few. Time: two or three predictions (concept, anchor, and the empty
    prompt) for each step of each drawing, d^2 operations in float64 for each row of each reader, and one factorisation and one
    SVD of d x d for each reader.
    """
    check_weights(erase_scale, preserve_scale, lamb)
    readers, device = model.arch.text_readers(), exact_device(model.arch)
    sums = {name: Sums(next(iter(linears.values())).in_features, device) for name, linears in readers.items()}
    empty, plan = drawings(model.arch, prompts, rows, preserve_rows)
    text, keep = prompts.text.to(model.arch.device), preserve_scale / (steps * images)
    weights = {"move": erase_scale / (steps * images), "keep": keep, "empty": keep / len(plan)}
    with progress("drawings") as show:
        for done, drawing in enumerate(plan, 1):
            beside = {prompt: text[[prompts.index[prompt]]] for prompt in ("", drawing.concept or "")}
            hook = _Capture(drawing, beside, empty, weights, sums)
            with _reading(readers, hook):
                sample(model, [drawing.prompt] * images, range(seed, seed + images), steps=steps, hooks=[hook])
            show(done, len(plan))
    return {name: sums.pop(name).change(lamb) for name in readers}


def drawings(arch: Architecture, prompts: TaskPrompts, rows: RowChoice, preserve_rows: KeepChoice) -> tuple[Tensor, list[Drawing]]:
    """The empty prompt's rows to keep [m], and the drawings of a task: one for each pair of prompts and each preserved prompt."""
    count, length, _ = prompts.text.hidden.shape
    # Rows that are their own positions, so that what picks rows to move and to keep picks positions.
    positions = torch.arange(length).expand(count, length)[..., None]
    segments = arch.text_streams()["hidden"].segments(replace(prompts.text, hidden=positions))
    plan = []
    for pair in prompts.pairs:
        text = replace(prompts, pairs=(pair,), kept=()).rows(segments)
        mixed = tuple((_mixed(concept), _mixed(anchor)) for concept, anchor in text.pairs)
        source, target = replace(text, pairs=mixed).moved(rows)
        plan.append(Drawing(fill(*pair[2:]), fill(*pair[:2]), source[:, 0], target[:, 0], source[:0, 0]))
    for job in prompts.kept:
        kept = replace(prompts, pairs=(), kept=(job,)).rows(segments).preserved(preserve_rows)[:, 0]
        plan.append(Drawing(fill(*job), None, kept[:0], kept[:0], kept))
    return prompts.rows(segments).empty[:, 0], plan


def _mixed(prompt: Placed) -> Placed:
    """As joint attention leaves it: every row has read the whole prompt, and none is the same in every prompt."""
    return replace(prompt, leading=0, causal=False)


class _Capture(Hook):
    """Sums what the readers read of one drawing.

    texts: the encoded prompts that are read beside it. empty [m]: the rows of the empty prompt that are kept. weights: of each
    row to "move", to "keep" and of the "empty" prompt.
    """

    def __init__(self, drawing: Drawing, texts: Mapping[str, Text], empty: Tensor, weights: Mapping[str, float], sums: Mapping[str, Sums]):
        self.drawing, self.texts, self.empty, self.weights, self.sums = drawing, texts, empty, weights, sums

    def on_prompt(self, state: State) -> None:
        """Under guidance the empty prompt is among the conditions; without, it is read beside them."""
        every = torch.zeros(len(state.prompts), dtype=torch.long)
        self.blank = "negative" if "negative" in state.texts else "blank"
        state.texts.setdefault(self.blank, self.texts[""][every])
        # A prompt that is its own anchor is not read twice, as rounding would tell the two apart.
        self.concept = "prompt" if self.drawing.concept == self.drawing.prompt else "concept"
        if self.drawing.concept is not None and self.concept == "concept":
            state.texts["concept"] = self.texts[self.drawing.concept][every]
        self.conditions = list(state.texts)
        self.length = state.texts["prompt"].hidden.shape[1]

    def read(self, reader: str, rows: Tensor) -> None:
        """rows [conditions * n, L, d], or with the image's rows after the text's."""
        read, sums = dict(zip(self.conditions, rows.chunk(len(self.conditions)), strict=True)), self.sums[reader]
        image = torch.arange(self.length, rows.shape[1])

        def chosen(condition: str, *positions: Tensor) -> Tensor:
            return read[condition][:, torch.cat(positions)].flatten(0, 1)

        if self.drawing.concept is not None:
            sums.move(chosen(self.concept, self.drawing.source), chosen("prompt", self.drawing.target), self.weights["move"])
        sums.keep(chosen("prompt", self.drawing.kept, image), self.weights["keep"])
        sums.keep(chosen(self.blank, self.empty, image), self.weights["empty"])


@contextmanager
def _reading(readers: Mapping[str, Mapping[str, nn.Linear]], hook: _Capture) -> Iterator[None]:
    """Show the hook what each reader reads within the block."""
    with ExitStack() as registered:
        for name, linears in readers.items():

            def before(module: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
                hook.read(name, given[0])

            handle = next(iter(linears.values())).register_forward_pre_hook(before)
            registered.callback(handle.remove)
        yield
