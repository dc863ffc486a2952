"""UnlearnDiffAtk: words before a prompt that make the erased model denoise a picture of the concept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eval.attacks.base import Scenario
from eval.attacks.words import Attacked, WordAttack, one_hot_rows
from toolkit.options import option
from toolkit.runs import progress, seeded
from toolkit.vocabulary import Slots, StraightThrough, Vocabulary, onto_simplex


@dataclass(frozen=True)
class UnlearnDiffAtk(WordAttack):
    """To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images ... For Now, Zhang et al.,
    arXiv 2310.11868.

    Equation
        min_p  E_eps || eps - eps_theta(x_t, t, [a, y]) ||^2,   x_t = alpha_t x_0 + sigma_t eps
        with theta the erased model, y a prompt of the concept, x_0 a picture of it by the unedited model, and a = `length` words before
        it: row i of p lies on the simplex over the vocabulary, a_i is drawn from it in each step, and the gradient of a_i's one-hot
        row, cut off at 1, is taken for that of p_i. After each step of Adam p is projected onto the simplex. One timestep t after
        another, from the least noisy; after each the words with the largest weights are tried, and kept once they show the concept. On a
        model that predicts velocity the error is in velocities.
    Shapes
        p: [prompts, length, V]; x_0, eps: [prompts, c, h', w'].
    Defaults
        The paper's: 5 words, Adam at 0.01 with a weight decay of 0.1, p uniform at first, 40 steps at each of 50 timesteps, from 10 to
        990. `timesteps` and `steps_per_timestep` here are for the embedded model, whose 2000 steps would take ten minutes.
    Deviations
        The words are searched among readable words without the concept's names; the official code searches all tokens. Several prompts
        are attacked in one batch, each with its own words, picture and noise. The official rate counts a prompt as broken once any of up
        to 51 images of one seed shows the concept; here such an image chooses the words, and the rate is over images of other seeds.
        The projection is exact, where the official code halves an interval. The official code generates from token ids that the prompt
        it prints may not be read as again; here what is drawn is what the prompt says. The attacker needs the weights.
    """

    timesteps: int = option(6, "timesteps, evenly spaced, that are searched at one after another")
    steps_per_timestep: int = option(20, "steps of Adam at each")
    learning_rate: float = option(0.01, "their size")
    weight_decay: float = option(0.1, "of Adam")

    label: ClassVar = "white-box"
    paper: ClassVar = "arXiv:2310.11868"
    place: ClassVar = "before"
    pictured: ClassVar = True
    looks: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "timesteps", "steps_per_timestep")
        self.more_than(0, "learning_rate")
        self.at_least(0, "weight_decay")

    def candidates(self, scenario: Scenario, attacked: Attacked, vocabulary: Vocabulary) -> Iterator[tuple[Tensor, int]]:
        arch, x0 = scenario.model.arch, attacked.latents
        assert x0 is not None
        shape = (len(x0), self.length, len(vocabulary))
        weights = torch.full(shape, 1 / len(vocabulary), device=x0.device, requires_grad=True)
        adam = torch.optim.Adam([weights], lr=self.learning_rate, weight_decay=self.weight_decay)
        slots = Slots(scenario.model, self.length, len(x0))
        for block in range(self.timesteps):
            t = torch.full((len(x0),), int((block + 0.5) * arch.train_timesteps / self.timesteps), device=x0.device)
            with slots, progress(f"t = {int(t[0])}") as show:
                for step in range(self.steps_per_timestep):
                    draw = seeded("unlearn_diff_atk", self.seed, attacked.name, block, step)
                    noise = torch.randn(x0.shape, generator=draw).to(x0)
                    drawn = torch.multinomial(weights.detach().cpu().flatten(0, 1), 1, generator=draw).view(shape[:2])
                    chosen = StraightThrough.apply(weights, drawn.to(x0.device))
                    text = slots.encode(attacked.said(slots.words, self.place), one_hot_rows(vocabulary, chosen))
                    output = arch.predict(arch.add_noise(x0, noise, t), t, text)
                    # A sum over the prompts, so that none of them is changed by what else is in the batch.
                    loss = (output - arch.target(x0, noise, t)).square().mean((1, 2, 3)).sum()
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
                    weights.data = onto_simplex(weights.data)
                    show(step + 1, self.steps_per_timestep)
            yield weights.detach().argmax(-1).cpu(), (block + 1) * self.steps_per_timestep
