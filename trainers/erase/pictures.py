"""Pictures of the concepts that are erased, for methods that train on them: a folder of the user's, or what the model draws itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.pictures import pictures
from toolkit.runs import seeded
from trainers.erase.options import TrainedOnPictures, drawing_options
from trainers.erase.prompts import concept_prompts
from trainers.erase.samples import Noised, noised
from trainers.photos import drawings, load_photos, to_latents

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture
    from toolkit.concepts import EraseTask
    from toolkit.model import Model
    from trainers.loop import Batch


@dataclass(frozen=True)
class NoisedPictures(Noised):
    """Pictures with noise. prompts: one for each."""

    prompts: list[str]


@dataclass(frozen=True)
class Pictures:
    """Pictures of concepts, and the prompts that they may be trained with.

    latents: [n, c, h', w']. concepts: which of them each picture is of. prompts: of each concept.
    """

    arch: Architecture
    latents: Tensor
    concepts: Sequence[int]
    prompts: Sequence[Sequence[str]]

    @classmethod
    def of(cls, model: Model, method: TrainedOnPictures, task: EraseTask) -> Self:
        """Those of the folder, which are of the task's only concept, or the model's drawings of every template around every word."""
        each = prompts_of(task)
        if method.images is not None:
            if len(each) > 1:
                raise UserError(f"images are of one concept, and the task has {len(each)}; erase one at a time, or give no images")
            latents = to_latents(model.arch, load_photos(pictures(method.images), model.arch.image_size))
            return cls(model.arch, latents, [0] * len(latents), each)
        drawn = [prompts[i % len(prompts)] for prompts in each for i in range(method.n_images)]
        latents = drawings(model, drawn, first_seed=method.seed, **drawing_options(method, model))
        return cls(model.arch, latents, [concept for concept in range(len(each)) for _ in range(method.n_images)], each)

    def noised(self, what: str, seed: int, batch: Batch, size: int) -> NoisedPictures:
        """The samples of a part of a step's batch: pictures in turn, and what is drawn from the step and their places alone."""
        own = batch.places(size)
        chosen = [self._in_turn(what, seed, batch.step * batch.parts * size + place) for place in own]
        draws = [seeded(what, seed, batch.step, place) for place in own]
        asked = [self.prompts[self.concepts[picture]] for picture in chosen]
        prompts = [some[int(torch.randint(len(some), (), generator=draw))] for some, draw in zip(asked, draws, strict=True)]
        seen = noised(self.arch, self.latents[chosen], draws)
        return NoisedPictures(seen.latents, seen.t, seen.target, prompts)

    def _in_turn(self, what: str, seed: int, number: int) -> int:
        """The picture of the sample with this number, counted from the first of the first step."""
        turn, place = divmod(number, len(self.latents))
        return int(torch.randperm(len(self.latents), generator=seeded(f"{what} round", seed, turn))[place])


def prompts_of(task: EraseTask) -> list[list[str]]:
    """Every template around every word, for each concept."""
    return [[prompt for prompt, _ in concept_prompts(replace(task, concepts=(concept,)))] for concept in task.concepts]
