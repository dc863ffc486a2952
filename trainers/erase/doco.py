"""DoCo: what a concept's prompt gives becomes what its anchor's gives, as far as a discriminator can tell, and the prior stays."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.concepts import Concept, EraseTask, Task
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.runs import seeded
from trainers.erase.drawings import Drawings, asked_by_anchor
from trainers.erase.options import TrainedOnDrawings
from trainers.erase.prompts import erase_task
from trainers.loop import Batch, LoopConfig, Objective
from trainers.parameters import parameter_names
from trainers.weights import FullWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

BETAS = (0.5, 0.999)  # of the discriminator's Adam
WIDTHS = (64, 128, 256, 512)  # of its strided layers; further ones are as wide as the last
GROUPS = 32  # of their normalization
ANCHOR, CONCEPT = 0.0, 1.0  # what it is to answer


@dataclass(frozen=True)
class DoCo(TrainedOnDrawings):
    """Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving Gradient, Wu et al., arXiv 2405.15304.

    Equation
        min_D      E_{x, eps, t}  H(D(z*(x_t, c)), 0) + H(D(z(x_t, c*)), 1)
        min_theta  E_{x, eps, t}  H(D(z(x_t, c*)), 0)                                with the gradient g_a
        prior      E_{x, eps, t}  || e_theta(x_t, k, t) - eps ||^2                   with the gradient g_p
        theta goes along  g_a - surgery min(g_a . g_p, 0) / ||g_p||^2 g_p + prior_weight g_p,    tensor by tensor
        with H the cross-entropy of a logit, c* the concept's prompt, c the same with the anchor in the concept's place, x what the
        frozen model draws of c, x_t = alpha_t x + sigma_t eps at a uniform t, z(x_t, p) the clean latents that e_theta(x_t, p, t)
        implies, z* the same of the frozen model, and the prior's x a drawing of its prompt k: an anchor's, or a preserved one. Where
        the two gradients disagree, surgery takes out of g_a what would raise the prior, as PCGrad (arXiv 2001.06782) does.
        On a model that predicts velocity the prior is in velocities.

    Shapes
        x, x_t, z, eps: [batch, c, h', w']. D: [batch, c, h', w'] -> [batch, 1, 3, 3] where h' and w' are powers of 2 from 8 on: as
        many strided layers as leave a side of 4 (4 for latents of 64, 2 for 16), and one without stride.

    Defaults
        The official commands': 2000 steps of 8 samples, in the first half of which D alone learns (`warmup`), AdamW at 6e-6 times
        these 8, Adam at 1e-4 for D (objects and nudity; 5e-4 for styles), keys and values of the cross-attention (x_strict; its
        "full-weight" is all), 1000 drawings of 25 steps at guidance 6. Without surgery the prior counts 0.1.

    Deviations
        The official projection lacks a factor of ||g_a||: it takes out the cosine times a unit vector, which after its clipping to a
        norm of 1 is always too much, so that g_a then lowers the prior. Here it is PCGrad's. As in the official code the prior's own
        gradient is not followed when there is surgery; prior_weight adds it. The official branch with surgery forgets the scheduler
        of the step size; here every step has it. D normalizes every sample alone, in groups of
        channels, where the official BatchNorm makes a sample's answer depend on what else is in the batch, on several devices too;
        and its depth is that of the paper for latents of 64 alone. The official code clips each of the two gradients of the denoiser
        and not D's; here the loop clips the norm of all that is trained together, after surgery. Clean latents are those implied, not
        clipped as some schedulers' configurations ask. What the task preserves is in the prior, in turn with the anchors. The
        drawings stay latents, and prompts are the templates, as in concept_ablation, with what it says of concepts without an anchor.
        Several concepts share one D. Surgery looks at the samples that are computed at once: with several processes or accumulated
        gradients each part's gradient is projected on its own, and the parts' mean is followed. Everything else is the same as in
        one batch. Gradients are taken within the loss, whose own gradient is then the projected one; mixed precision is bf16.
    """

    surgery: float = option(1.0, "part of what would raise the prior that is taken out of the gradient; 0: none")
    prior_weight: float | None = option(None, "weight of the prior's own gradient; none: 0 with surgery, 0.1 without")
    warmup: float = option(0.5, "part of the steps, from the first on, in which the discriminator alone learns")
    discriminator_learning_rate: float = option(1e-4, "step size of the discriminator")
    parameters: Literal["x_strict", "x", "all"] = option(
        "x_strict", "what is trained: x_strict (keys and values of the cross-attention), x (all of it), or all"
    )
    trajectories: int = option(1000, "drawings of the anchors' prompts by the frozen model that are trained on; as many for the prior")
    sampling_steps: int = option(25, "steps of each of them")
    guidance: float = option(6.0, "guidance scale of the drawings")
    max_train_steps: int = option(2000, "optimizer steps")
    train_batch_size: int = option(8, "samples that are computed at once")
    learning_rate: float = option(4.8e-5, "step size")

    paper: ClassVar = "arXiv:2405.15304"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "prior_weight")
        self.more_than(0, "discriminator_learning_rate")
        if not (0 <= self.surgery <= 1 and 0 <= self.warmup < 1):
            raise UserError(f"surgery {self.surgery}, warmup {self.warmup}; needs 0 to 1, and 0 to less than 1")
        if self.optimizer == "prodigy":
            raise UserError("optimizer is prodigy, which has one step size, and the discriminator needs its own; give adamw")
        if self.mixed_precision == "fp16":
            raise UserError("mixed_precision is fp16, in which the gradients that surgery compares vanish; give bf16")

    @property
    def beside(self) -> float:
        """The weight of the prior's own gradient."""
        return self.prior_weight if self.prior_weight is not None else 0.0 if self.surgery else 0.1

    @property
    def keeps(self) -> bool:
        """Whether there is a prior."""
        return self.surgery > 0 or self.beside > 0

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        task = erase_task(task, needs_preserved=False)
        if task.preserve and not self.keeps:
            why = "surgery and prior_weight are 0, so what the task preserves has no effect; set one of them to keep that"
            warnings.warn(why, stacklevel=2)
        correction = Correction(model, self, task)
        with correction.weights:
            yield correction, correction.weights.edit

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with an anchor, one without, and what is to stay."""
        return EraseTask((Concept("cat", anchor="dog"), Concept("bird")), preserve=("cow",))


class Correction(Objective):
    """What a discriminator says of the concept's clean latents, beside the frozen model's of the anchor, and the discriminator's loss.

    The loss is that of both, and its gradient with respect to the denoiser's weights the one that surgery leaves.
    """

    def __init__(self, model: Model, method: DoCo, task: EraseTask) -> None:
        asked = asked_by_anchor(task, method.trajectories)
        if method.keeps and len(task.preserve) > method.trajectories:
            raise UserError(f"trajectories is {method.trajectories}, for {len(task.preserve)} preserved prompts; give one for each")
        self.arch, self.method = model.arch, method
        self.first = int(method.warmup * method.max_train_steps)  # the step from which the denoiser learns
        self.weights = FullWeights(model, parameter_names(model.arch, method.parameters))
        self.anchors = Drawings(model, method, asked)
        self.discriminator = Discriminator(self.anchors.x0.shape[1:], method.seed).to(model.arch.device)
        self.module = nn.ModuleDict({"weights": self.weights, "discriminator": self.discriminator})
        self.prior = self.anchors if method.keeps else None
        if self.prior is not None and task.preserve:
            self.prior = Drawings(model, method, {prompt: [prompt] for prompt in (*task.preserve, *asked)})

    def optimizer(self, parameters: list[nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
        made = super().optimizer(list(self.weights.parameters()), config)
        own = {"lr": self.method.discriminator_learning_rate, "betas": BETAS, "weight_decay": 0.0}
        made.add_param_group({"params": list(self.discriminator.parameters()), **own})
        return made

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        seen, learns = self.anchors.noised("erase", batch), batch.step >= self.first
        # With gradient first: autocast reuses the weights that it has cast, and those cast without gradient would stay so.
        with torch.set_grad_enabled(learns):
            concept = self.arch.to_x0(self.arch.predict(seen.latents, seen.t, seen.asked), seen.latents, seen.t)
        gradients, values = self._gradients(concept, batch) if learns else ([], {})
        with self.weights.off(), torch.no_grad():
            anchor = self.arch.to_x0(self.arch.predict(seen.latents, seen.t, seen.drawn), seen.latents, seen.t)
        total = _entropy(self.discriminator(anchor), ANCHOR) + _entropy(self.discriminator(concept.detach()), CONCEPT)
        values = {"discriminator": total.item(), **values}
        for parameter, gradient in zip(self.weights.parameters() if learns else (), gradients, strict=True):
            product = (parameter * gradient).sum()
            total = total + product - product.detach()
        return total + values.get("adversarial", 0.0) + self.method.beside * values.get("prior", 0.0), values

    def _gradients(self, concept: Tensor, batch: Batch) -> tuple[Sequence[Tensor], dict[str, float]]:
        """The gradient that the denoiser's weights go along, and the values of what it is of. One graph at a time is kept."""
        parameters = list(self.weights.parameters())
        adversarial = _entropy(self.discriminator(concept), ANCHOR)
        gradients = torch.autograd.grad(adversarial, parameters, materialize_grads=True)
        if self.prior is None:
            return gradients, {"adversarial": adversarial.item()}
        seen = self.prior.noised("prior", batch)
        prior = F.mse_loss(self.arch.predict(seen.latents, seen.t, seen.drawn), seen.target)
        beside = torch.autograd.grad(prior, parameters, materialize_grads=True)
        parted = [without_conflict(a, b, self.method.surgery) + self.method.beside * b for a, b in zip(gradients, beside, strict=True)]
        return parted, {"adversarial": adversarial.item(), "prior": prior.item()}


def without_conflict(gradient: Tensor, other: Tensor, part: float = 1.0) -> Tensor:
    """PCGrad's projection: the gradient less (so much of) its component along the other, where that points the other way."""
    along = F.normalize(other.flatten(), dim=0).view_as(other)
    return gradient - part * (gradient * along).sum().clamp(max=0) * along


class Discriminator(nn.Sequential):
    """Latents [n, c, h', w'] -> a logit [n, 1, h'', w''] for each of their patches. shape: of one latent, with sides of 4 or more."""

    def __init__(self, shape: Sequence[int], seed: int) -> None:
        channels, *sides = shape
        if min(sides) < 4:
            raise UserError(f"latents are {sides[0]}x{sides[1]}, and the discriminator needs sides of at least 4; take a larger model")
        layers = list[nn.Module]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded("discriminator", seed).initial_seed())
            for i in range(max(1, int(math.log2(min(sides))) - 2)):
                width = WIDTHS[min(i, len(WIDTHS) - 1)]
                layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), *([nn.GroupNorm(GROUPS, width)] if i else [])]
                layers.append(nn.LeakyReLU(0.2))
                channels = width
            layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        super().__init__(*layers)


def _entropy(logits: Tensor, wanted: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, wanted, dtype=torch.float32))
