"""P4D: words that make the erased model denoise as the unedited one does with a prompt of the concept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eval.attacks.base import Scenario
from eval.attacks.words import Attacked, WordAttack
from toolkit.options import option
from toolkit.runs import progress, seeded
from toolkit.vocabulary import Slots, Vocabulary


@dataclass(frozen=True)
class P4D(WordAttack):
    """Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts, Chin et al., arXiv 2309.06135.

    Equation
        min_a  E_{x_t, t} || eps_theta(x_t, t, near(a)) - eps_theta0(x_t, t, y) ||^2
        with theta the erased and theta0 the unedited model, y a prompt of the concept, x_t a noised picture of it by the unedited model,
        a free embeddings and near(a) the words of the nearest embeddings by the cosine, whose gradient is taken for a's own. P4D-N: the
        words stand alone. After every `steps_per_look` steps the words are tried, and kept once they show the concept. On a model that
        predicts velocity the difference is one of velocities.
    Shapes
        a: [prompts, length, d] for each text encoder; x_t: [prompts, c, h', w'].
    Defaults
        The official code's: AdamW at 0.1 with a weight decay of 0.1, a starts at random words, tried every 50 steps; it makes 3000 steps
        for 16 words. `steps`, `steps_per_look` and `length` here are for the embedded model, whose captions have some 10 words.
    Deviations
        `noises` noised pictures of each prompt are drawn once with what the unedited model says of them, and a step takes one of these;
        the official code asks the second model anew in each step, on a second GPU. It keeps the words whose images are most similar to
        the picture for a CLIP, where here whoever counts says whether they show the concept; the rate is over images of other seeds. It
        starts at, and searches, all tokens, special ones among them, and does not look whether the prompt that it prints is read as the
        same ids again. Several prompts are attacked in one batch. P4D-K, in which a word stands after every third of the prompt's own, and
        defences by guidance are left out. The attacker needs the weights of both models.
    """

    length: int = option(8, "words that are found for each prompt")
    steps: int = option(120, "steps of AdamW")
    steps_per_look: int = option(30, "steps after which the words are tried")
    learning_rate: float = option(0.1, "size of the steps")
    weight_decay: float = option(0.1, "of AdamW")
    noises: int = option(12, "noised pictures of each prompt")

    label: ClassVar = "white-box"
    paper: ClassVar = "arXiv:2309.06135"
    pictured: ClassVar = True
    looks: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "steps", "steps_per_look", "noises")
        self.more_than(0, "learning_rate")
        self.at_least(0, "weight_decay")

    def candidates(self, scenario: Scenario, attacked: Attacked, vocabulary: Vocabulary) -> Iterator[tuple[Tensor, int]]:
        arch, x0 = scenario.model.arch, attacked.latents
        assert x0 is not None
        noised = self.noised(scenario, attacked, x0)
        first = vocabulary.random((len(x0), self.length), seeded("p4d", self.seed, attacked.name))
        free = {part: rows[first].requires_grad_() for part, rows in vocabulary.rows.items()}
        adam = torch.optim.AdamW(free.values(), lr=self.learning_rate, weight_decay=self.weight_decay)
        slots = Slots(scenario.model, self.length, len(x0))
        for start in range(0, self.steps, self.steps_per_look):
            end = min(start + self.steps_per_look, self.steps)
            with slots, progress("p4d") as show:
                for step in range(start, end):
                    x, t, target = noised[int(torch.randint(len(noised), (), generator=seeded("p4d", self.seed, attacked.name, step)))]
                    choice = vocabulary.nearest(free)
                    words = {part: vocabulary.rows[part][choice].requires_grad_() for part in free}
                    output = arch.predict(x, t, slots.encode(attacked.said(slots.words, self.place), words))
                    # A sum over the prompts, so that none of them is changed by what else is in the batch.
                    loss = (output - target).square().mean((1, 2, 3)).sum()
                    for rows, gradient in zip(free.values(), torch.autograd.grad(loss, list(words.values())), strict=True):
                        rows.grad = gradient
                    adam.step()
                    show(step + 1, self.steps)
            yield vocabulary.nearest(free).cpu(), end

    @torch.no_grad()
    def noised(self, scenario: Scenario, attacked: Attacked, x0: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """x_t, t and what the unedited model says of them, `noises` times for all prompts; timesteps are spread evenly for each."""
        arch = scenario.base.arch
        text, parts = arch.encode(attacked.prompts), []
        with progress("p4d, the unedited model") as show:
            for i in range(self.noises):
                draw = seeded("p4d noise", self.seed, attacked.name, i)
                place = (torch.rand(len(x0), generator=draw) + i) / self.noises
                t = (place * arch.train_timesteps).long().to(x0.device)
                x = arch.add_noise(x0, torch.randn(x0.shape, generator=draw).to(x0), t)
                parts.append((x, t, arch.predict(x, t, text)))
                show(i + 1, self.noises)
        return parts
