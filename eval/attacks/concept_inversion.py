"""Concept inversion: a word that makes the erased model draw the concept again, learnt from pictures of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.attacks.base import Attack, AttackResult, Pictures, Scenario, Spent
from eval.rates import Shown
from toolkit.edits.token import TokenEdit
from toolkit.options import option
from toolkit.prompt_search import TokenRows, search
from toolkit.runs import computes_in_bf16, progress, seeded
from trainers.timesteps import timesteps

if TYPE_CHECKING:
    from toolkit.model import Model

TOKEN = "<found>"


@dataclass(frozen=True)
class ConceptInversion(Attack):
    """Circumventing Concept Erasure Methods For Text-to-Image Generative Models, Pham et al., arXiv 2308.01508.

        v* = argmin_v E_{z, y, eps, t} || eps - eps_theta(z_t, t, c(y; v)) ||^2

    on the erased model theta, z the latents of pictures of the concept, which the unedited model draws, y their captions with the new
    word in the concept's place. The official code learns one vector in 5000 steps from 25 pictures; max_train_steps and images here are
    for the embedded model, and the step size is the one that its code ends with (0.08) divided by 8: on the unedited model 300 steps
    find what draws every pistol, 120 a quarter. More vectors can teach what was never known, so they need the control all the more.
    Noisy timesteps, where it is decided what an image shows, are drawn more often; the official code draws them uniformly. The word
    starts at the mean of all words, where the official one starts at a general one ("art"). Of a group of objects each gets a word. The
    attacker needs the weights, and pictures.
    """

    num_vectors: int = option(1, "embedding vectors of the word")
    images: int = option(8, "pictures of each object that it is learnt from")
    max_train_steps: int = option(300, "steps of Adam")
    train_batch_size: int = option(4, "pictures in a step")
    learning_rate: float = option(1e-2, "step size")
    timestep_sampling: Literal["uniform", "stratified", "cubic"] = option("cubic", "cubic prefers noisy ones")
    seed: int = option(0, "of what is drawn")

    label: ClassVar = "white-box"
    paper: ClassVar = "arXiv:2308.01508"
    controlled: ClassVar = True

    def __post_init__(self) -> None:
        self.at_least(1, "num_vectors", "images", "max_train_steps", "train_batch_size")

    def run(self, scenario: Scenario) -> AttackResult:
        names = scenario.names()
        _, clean = scenario.by_name()
        words = {name: TOKEN if len(names) == 1 else f"<found-{i}>" for i, name in enumerate(names)}
        rows, drawn = {}, 0
        for name, word in words.items():
            pictures = scenario.pictures(name, self.images)
            rows |= self.found(scenario.model, pictures, word).tokens
            drawn += pictures.drawn
        edit = TokenEdit.from_rows(rows)
        shown: list[Shown] = []
        with scenario.model.attached(edit):
            for name, word in words.items():
                shown += scenario.painter.draw(scenario.model, scenario.asked(name, (word,)), f"attack {name}")
        spent = Spent(len(words) * self.max_train_steps, drawn)
        return self.result(scenario, shown, clean, edit=edit, spent=spent)

    def found(self, model: Model, pictures: Pictures, word: str = TOKEN) -> TokenEdit:
        """The word that draws these best with this model."""
        arch, count = model.arch, self.train_batch_size
        captions = [caption.format(word) for caption in pictures.captions]
        rows = TokenRows(model, {word: None}, vectors=self.num_vectors, seed=self.seed)
        with progress("inversion") as show, rows:

            def loss(step: int) -> Tensor:
                draw = seeded("concept inversion", self.seed, step)
                chosen = torch.randint(len(captions), (count,), generator=draw)
                z = pictures.latents[chosen.to(pictures.latents.device)]
                t = timesteps(self.timestep_sampling, count, arch.train_timesteps, draw).to(z.device)
                noise = torch.randn(z.shape, generator=draw).to(z)
                show(step + 1, self.max_train_steps)
                with torch.autocast(z.device.type, torch.bfloat16, enabled=computes_in_bf16(z.device.type)):
                    output = arch.predict(arch.add_noise(z, noise, t), t, rows([captions[i] for i in chosen]))
                return F.mse_loss(output.float(), arch.target(z, noise, t))

            search(rows, loss, steps=self.max_train_steps, lr=self.learning_rate, seed=self.seed)
        return rows.edit()
