"""Concept ablation: a concept's prompt comes to mean what its anchor's prompt means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.concepts import Concept, EraseTask, Task
from toolkit.method import option
from trainers.erase.drawings import Drawings, NoisedDrawings, asked_by_anchor
from trainers.erase.options import TrainedOnDrawings
from trainers.erase.prompts import erase_task
from trainers.loop import Batch, Objective
from trainers.parameters import parameter_names
from trainers.weights import FullWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model


@dataclass(frozen=True)
class ConceptAblation(TrainedOnDrawings):
    """Ablating Concepts in Text-to-Image Diffusion Models, Kumari et al., arXiv 2303.13516.

    Equation
        min_theta  E_{x, eps, t} || e_theta(x_t, c*, t) - sg[e_theta(x_t, c, t)] ||^2                       target "model"
                   E_{x, eps, t} || e_theta(x_t, c*, t) - eps ||^2                                          target "noise"
                   + prior_weight E_{x, eps, t} || e_theta(x_t, c, t) - eps ||^2                            of either
        with c* the concept's prompt, c the same with the anchor in the concept's place, x what the frozen model draws of c,
        x_t = alpha_t x + sigma_t eps at a uniform t, and sg no gradient. Target "frozen" is "model" with the frozen e* for the second
        e_theta. On a model that predicts velocity the same is done in velocities.

    Shapes
        e, x, x_t, eps: [batch, c, h', w'].

    Defaults
        The official code's for objects and styles: 100 steps of 8 samples (2 devices with 4), AdamW at 2e-6 times these 8, keys and
        values of the cross-attention (x_strict; its "full-weight" is all), 200 drawings (1000 in the paper) of 50 steps at guidance
        7.5, no prior. For memorized images its command trains all, with prior_weight 1, in 200 steps of 4 samples.

    Deviations
        The paper stands the model in training, without gradient, in for the frozen one to save a copy; no copy is needed here, so the
        one that it stands for is on offer (target frozen). The drawings stay latents, where the official code decodes them, keeps
        pictures and encodes these; so its flips and its resizing (with "zoomed in" or "far away" in the prompt) are left out. Prompts
        are the templates, where the official code asks a language model for captions of objects and searches the web for pictures
        as anchors of a style. A concept without an anchor, which the paper does not have, goes to the template without its word: the
        paper's anchor prompts are what is left of a prompt when the concept is taken out, and the empty prompt would unlearn the rest
        of the template too. The prior learns the model's own kind of target, where the official code takes the noise on every model
        beside target "model", and its doubling of the step size with a prior is left to learning_rate. Training the token embedding
        (its "embedding") is left out. What the task preserves counts by `preserve_weight` alone, with
        || e_theta(x_t, k, t) - e*(x_t, k, t) ||^2 on drawings of the preserved prompts, which neither paper nor code has; with its
        default of 0 it has no effect.
    """

    target: Literal["model", "frozen", "noise"] = option(
        "model", "learned for the concept: what the model in training (model) or before it (frozen) says of the anchor, or the noise"
    )
    parameters: Literal["x_strict", "x", "all"] = option(
        "x_strict", "what is trained: x_strict (keys and values of the cross-attention), x (all of it), or all"
    )
    prior_weight: float = option(0.0, "weight of the anchor's prompt denoising its own drawings as before")
    trajectories: int = option(200, "drawings of the anchors' prompts by the frozen model that are trained on")
    guidance: float = option(7.5, "guidance scale of the drawings")
    preserve_weight: float = option(0.0, "weight of preserved prompts staying as they are")
    max_train_steps: int = option(100, "optimizer steps")
    train_batch_size: int = option(4, "samples that are computed at once")
    gradient_accumulation_steps: int = option(2, "such batches in a step, one after the other")
    learning_rate: float = option(1.6e-5, "step size")

    paper: ClassVar = "arXiv:2303.13516"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "prior_weight", "preserve_weight")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        ablation = Ablation(model, self, erase_task(task, self.preserve_weight))
        with ablation.weights:
            yield ablation, ablation.weights.edit

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with an anchor, and one without."""
        return EraseTask((Concept("cat", anchor="dog"), Concept("bird")))


class Ablation(Objective):
    """The distance of the concept's prediction on a noised drawing of the anchor to what is learned there."""

    def __init__(self, model: Model, method: ConceptAblation, task: EraseTask) -> None:
        asked = asked_by_anchor(task, method.trajectories)
        self.module = self.weights = FullWeights(model, parameter_names(model.arch, method.parameters))
        self.arch, self.method = model.arch, method
        self.anchors = Drawings(model, method, asked)
        self.kept = Drawings(model, method, {prompt: [prompt] for prompt in task.preserve}) if method.preserve_weight else None

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        method = self.method
        terms = [("erase", 1.0, self._erase(self.anchors.noised("erase", batch)))]
        if method.prior_weight:
            terms.append(("prior", method.prior_weight, self._prior(self.anchors.noised("prior", batch))))
        if self.kept is not None:
            terms.append(("keep", method.preserve_weight, self._keep(self.kept.noised("keep", batch))))
        total = torch.stack([weight * value for _, weight, value in terms]).sum()
        return total, {name: value.item() for name, _, value in terms} if len(terms) > 1 else {}

    def _erase(self, seen: NoisedDrawings) -> Tensor:
        # With gradient first: autocast reuses the weights that it has cast, and those cast without gradient would stay so.
        output = self.arch.predict(seen.latents, seen.t, seen.asked)
        if self.method.target == "noise":
            return F.mse_loss(output, seen.target)
        return F.mse_loss(output, self._without_gradient(seen, frozen=self.method.target == "frozen"))

    def _prior(self, seen: NoisedDrawings) -> Tensor:
        return F.mse_loss(self.arch.predict(seen.latents, seen.t, seen.drawn), seen.target)

    def _keep(self, seen: NoisedDrawings) -> Tensor:
        return F.mse_loss(self.arch.predict(seen.latents, seen.t, seen.drawn), self._without_gradient(seen, frozen=True))

    def _without_gradient(self, seen: NoisedDrawings, *, frozen: bool) -> Tensor:
        """What is predicted for the prompts that were drawn."""
        with torch.no_grad(), self.weights.off() if frozen else nullcontext():
            return self.arch.predict(seen.latents, seen.t, seen.drawn)
