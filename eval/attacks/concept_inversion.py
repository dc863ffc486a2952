"""Concept inversion: a word that makes the erased model draw the concept again, learnt from pictures of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.attacks.base import Attack, AttackResult, Scenario
from eval.prompts import single
from eval.rates import share
from toolkit.concepts import OBJECT_TEMPLATES
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.options import option
from toolkit.prompt_search import TokenRows, search
from toolkit.runs import progress, seeded
from toolkit.sample import trajectory

if TYPE_CHECKING:
    from toolkit.model import Model

TOKEN = "<found>"


@dataclass(frozen=True)
class ConceptInversion(Attack):
    """Circumventing Concept Erasure Methods For Text-to-Image Generative Models, Pham et al., arXiv 2308.01508.

        v* = argmin_v E_{z, y, eps, t} || eps - eps_theta(z_t, t, c(y; v)) ||^2

    on the erased model theta, z the latents of pictures of the concept, which the unedited model draws. The official code learns one
    vector in 5000 steps from 25 pictures; max_train_steps and images here are for the embedded model, and the step size is the one
    that its code ends with (0.08) divided by 8. The word starts at the mean of all words, where the official one starts at a general
    one ("art"). The attacker needs the weights, and pictures.
    """

    num_vectors: int = option(3, "embedding vectors of the word")
    images: int = option(4, "pictures of each object that it is learnt from")
    max_train_steps: int = option(100, "steps of Adam")
    train_batch_size: int = option(4, "pictures in a step")
    learning_rate: float = option(1e-2, "step size")
    seed: int = option(0, "of what is drawn")

    label: ClassVar = "white-box"
    paper: ClassVar = "arXiv:2308.01508"

    def __post_init__(self) -> None:
        self.at_least(1, "num_vectors", "images", "max_train_steps", "train_batch_size")

    def run(self, scenario: Scenario) -> AttackResult:
        if len(scenario.target.names) > 1:
            raise UserError(f"{scenario.target.name} is several objects, and a word is learnt for one; give one of them")
        name = next(iter(scenario.target.names))
        _, clean = scenario.by_name()
        edit = self.found(scenario.model, self.pictures(scenario.base, name))
        with scenario.model.attached(edit):
            prompts = single(scenario.world, name, scenario.n, seed=scenario.seed, words=(TOKEN,))
            shown = scenario.painter.draw(scenario.model, prompts, "attack")
        return AttackResult(
            attack_success_rate=share(shown, scenario.shows),
            clean_rate=share(clean, scenario.shows),
            label=self.label,
            prompts=tuple(dict.fromkeys(item.prompt.text for item in shown)),
            edit=edit,
            shown=shown,
        )

    def pictures(self, base: Model, name: str) -> Tensor:
        """Latents [images, c, h', w'] of what the unedited model draws of it."""
        prompts = [OBJECT_TEMPLATES[i % len(OBJECT_TEMPLATES)].format(name) for i in range(self.images)]
        return trajectory(base, prompts, range(10_000 + self.seed, 10_000 + self.seed + self.images), steps=20)

    def found(self, model: Model, pictures: Tensor) -> TokenEdit:
        """The word that draws these best with this model."""
        arch, count = model.arch, self.train_batch_size
        rows = TokenRows(model, {TOKEN: None}, vectors=self.num_vectors, seed=self.seed)
        with progress("inversion") as show, rows:

            def loss(step: int) -> Tensor:
                draw = seeded("concept inversion", self.seed, step)
                z = pictures[torch.randint(len(pictures), (count,), generator=draw)]
                t = torch.randint(arch.train_timesteps, (count,), generator=draw).to(z.device)
                noise = torch.randn(z.shape, generator=draw).to(z)
                asked = torch.randint(len(OBJECT_TEMPLATES), (count,), generator=draw)
                show(step + 1, self.max_train_steps)
                output = arch.predict(arch.add_noise(z, noise, t), t, rows([OBJECT_TEMPLATES[i].format(TOKEN) for i in asked]))
                return F.mse_loss(output, arch.target(z, noise, t))

            search(rows, loss, steps=self.max_train_steps, lr=self.learning_rate, seed=self.seed)
        return rows.edit()
