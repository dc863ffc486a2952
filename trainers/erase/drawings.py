"""What the frozen model draws of anchors and of what is kept, noised anew for every sample, for methods that train on pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch

from toolkit.arch.text import Text
from toolkit.concepts import EraseTask
from toolkit.errors import UserError
from toolkit.runs import seeded
from trainers.erase.options import TrainedOnDrawings, drawing_options
from trainers.erase.prompts import concept_prompts, one_each
from trainers.erase.samples import Noised, noised
from trainers.photos import drawings

if TYPE_CHECKING:
    from toolkit.model import Model
    from trainers.loop import Batch


def asked_by_anchor(task: EraseTask, trajectories: int) -> dict[str, list[str]]:
    """Each prompt of an anchor -> those of the concepts in whose place it stands; without an anchor, the template without its word."""
    asked: dict[str, list[str]] = {}
    for prompt, base in concept_prompts(task, without_anchor="template"):
        if prompt == base:
            raise UserError(f"{prompt!r} is to turn into itself, which changes nothing; give the concept another anchor")
        asked.setdefault(base, []).append(prompt)
    one_each(trajectories, task)
    return asked


@dataclass(frozen=True)
class NoisedDrawings(Noised):
    """Drawings with noise. drawn: the prompts that were drawn; asked: those in whose place they stand."""

    drawn: Text
    asked: Text


class Drawings:
    """What the frozen model draws of some prompts, each as often as the others up to one, noised anew for every sample.

    asked: a prompt that is drawn -> the prompts that a drawing of it may be paired with, uniformly.
    """

    def __init__(self, model: Model, method: TrainedOnDrawings, asked: Mapping[str, Sequence[str]]) -> None:
        self.arch, self.method = model.arch, method
        self.drawn = list(islice(cycle(asked), method.trajectories))
        self.x0 = drawings(model, self.drawn, first_seed=method.seed, **drawing_options(method, model)).cpu()  # [n, c, h', w']
        self.asked = asked
        used = dict.fromkeys(prompt for base in dict.fromkeys(self.drawn) for prompt in (base, *asked[base]))
        self.place, self.text = {prompt: row for row, prompt in enumerate(used)}, model.arch.encode(list(used))

    def noised(self, what: str, batch: Batch) -> NoisedDrawings:
        """The samples of a part of a step's batch: drawing, prompt, timestep and noise come from its step and their places alone."""
        draws = [seeded(what, self.method.seed, batch.step, place) for place in batch.places(self.method.train_batch_size)]
        rows, asked = [], []
        for draw in draws:
            row = int(torch.randint(len(self.drawn), (), generator=draw))
            prompts = self.asked[self.drawn[row]]
            asked.append(self.place[prompts[int(torch.randint(len(prompts), (), generator=draw))]])
            rows.append(row)
        drawn = [self.place[self.drawn[row]] for row in rows]
        seen = noised(self.arch, self.x0[rows].to(self.arch.device), draws)
        return NoisedDrawings(seen.latents, seen.t, seen.target, self.text[drawn], self.text[asked])
