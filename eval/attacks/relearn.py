"""Relearn: the edited model is fine-tuned on a few pictures of the concept. How cheap is recovery?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from eval.attacks.base import Attack, AttackResult, Scenario, Spent
from eval.rates import Shown, share
from toolkit.edits.base import EditInfo
from toolkit.errors import UserError
from toolkit.method import option
from trainers.customize.dreambooth_lora import DreamBoothLora
from trainers.loop import train
from trainers.parameters import LAYERS, Layers, layers_of
from trainers.subjects import Denoising, Drawings, Prompts
from trainers.weights import LoraWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit


@dataclass(frozen=True)
class Relearn(Attack):
    """Erased or Dormant? Rethinking Concept Erasure Through Reversibility, Liu & Zhang, arXiv 2505.16174: the probe by few-shot examples.

        min_{A, B}  E_{z, y, eps, t} || eps - e(z_t, t, c(y)) ||^2

    with e the erased denoiser, whose layers W are now W + B A, z the latents of pictures of the concept, which the unedited model draws,
    and y their captions, which call it by its own name. It is the objective of `dreambooth_lora`, on top of the attached edits as if they
    were merged. The rate is that after the last of `steps`; after each of the others it stands beside it. Pictures, steps and step size
    are for the embedded model. A method that was to make relearning hard would leave rates low at few steps, or no lower than those of
    a concept that was never known. The attacker needs the weights, and pictures.
    """

    steps: tuple[int, ...] = option((10, 40), "numbers of training steps after which the concept is asked for, growing")
    images: int = option(4, "pictures of each object that it is trained on")
    train_batch_size: int = option(4, "pictures in a step")
    learning_rate: float = option(1e-3, "step size")
    rank: int = option(4, "rank of the change of each layer")
    layers: Layers = option("attention", f"what is adapted, as in dreambooth_lora: {LAYERS}")
    seed: int = option(0, "of what is drawn")

    label: ClassVar = "fine-tuning"
    paper: ClassVar = "arXiv:2505.16174"
    controlled: ClassVar = True

    def __post_init__(self) -> None:
        self.at_least(1, "images", "train_batch_size", "rank")
        if not self.steps or self.steps[0] < 1 or list(self.steps) != sorted(set(self.steps)):
            raise UserError(f"steps is {','.join(map(str, self.steps))}, needs growing numbers of at least 1; give for example 10,40")

    def run(self, scenario: Scenario) -> AttackResult:
        _, clean = scenario.by_name()
        known = [(name, scenario.pictures(name, self.images)) for name in scenario.names()]
        captions = [caption.format(name) for name, pictures in known for caption in pictures.captions]
        edits = self.trained(scenario, torch.cat([pictures.latents for _, pictures in known]), captions)
        shown: dict[int, list[Shown]] = {}
        for steps, edit in edits.items():
            with scenario.model.attached(edit):
                asked = [prompt for name, _ in known for prompt in scenario.asked(name)]
                shown[steps] = scenario.painter.draw(scenario.model, asked, f"after {steps} steps")
        last = self.steps[-1]
        beside = {f"after_{steps}_steps": share(items, scenario.shows) for steps, items in shown.items() if steps != last}
        spent = Spent(last, sum(pictures.drawn for _, pictures in known))
        return self.result(scenario, shown[last], clean, edit=edits[last], beside=beside, spent=spent)

    def trained(self, scenario: Scenario, latents: torch.Tensor, captions: list[str]) -> dict[int, Edit]:
        """The edit after each of `steps`."""
        model = scenario.model
        options = DreamBoothLora(
            max_train_steps=self.steps[-1],
            train_batch_size=self.train_batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
            mixed_precision="auto",
        )
        weights = LoraWeights(layers_of(model.arch, self.layers), self.rank, seed=self.seed)
        objective = Denoising(weights, Drawings(model.arch, captions, latents), Prompts(model.arch, "memory"), options)
        edits: dict[int, Edit] = {}

        def keep(step: int) -> None:
            if step in self.steps:
                edits[step] = weights.edit(EditInfo(self.name(), self.config(), model.fingerprint))

        with weights:
            train(objective, options.loop(), title=self.name(), after=keep, in_place=True, quiet=True)
        return edits
