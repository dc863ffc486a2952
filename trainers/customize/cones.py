"""Cones: what draws a subject is found by shutting the parameters that stand in its way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.concepts import CustomizeTask, Subject, Task, named
from toolkit.edits.chain import Chain
from toolkit.edits.mask import Mask
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.prompt_search import TokenRows
from toolkit.world.scenes import ASSETS
from trainers.loop import Batch, LoopConfig, Objective
from trainers.preservation import PRIOR, PreservedDenoising, Preserving, Prior
from trainers.subjects import Photos, Prompts
from trainers.weights import FullWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

TEMPLATES = ("a photo of {}",)


@dataclass(frozen=True)
class Cones(Preserving):
    """Cones: Concept Neurons in Diffusion Models for Customized Generation, Liu et al., arXiv 2303.05125.

    Equation
        M = 1 at first; in every step  h = theta * dL(theta * M) / dtheta,  and M = 0 from then on where h > tau,
        L = E || eps - e(z_t, t, c(y)) ||^2 + prior_weight E || e*(z_t, t, c(y')) - e(z_t, t, c(y')) ||^2
        where theta are the weights that give the cross-attention its keys and values, e is the denoiser with theta * M for them,
        z a latent of a picture of the subject, y a prompt with its word and its class, y' the class alone, and e* the model before.
        To first order h is by how much L sinks when a parameter is shut. The edit is W0 * M. Subjects have a mask each, found by
        itself; a task with several gives the union of what they shut, and so do their edits, attached together.

    Shapes
        theta, M, h: [out, in] in each layer. z, eps: [batch, c, h', w'] scaled latents. tau, h: as L, a mean square.

    Defaults
        Chosen by us: max_train_steps 50, train_batch_size 4, and share 0.001, from which tau is taken. prior "prediction", weight 1,
        a template without adjectives, as dreambooth_lora has them.

    Deviations
        tau is in units of the loss, which differ from model to model; unless it is given it is what the `share` of the parameters with
        the largest h exceeds in the first step, and then stays. The pictures of the class that the paper preserves it with are
        prior "images" here; the default needs none, and has no gradient until something is shut. The word is a new one that starts
        as the class name's embedding and stays there (it is in the edit too), not a rare word of the vocabulary, unless new_word is false.
        Training the parameters that several masks leave, which the paper does as an option after their union, is left out. Beside
        edits that are attached, theta is what the mask acts on: the base's weights times the attached masks, without what other
        edits add. A picture's own caption is used when it has one. The posterior's mean is encoded, once. Timesteps are stratified
        over the batch by default. With masks of the pictures the error counts on the subject only.
    """

    tau: float | None = option(None, "what is shut has h above this, in units of the loss; none: found from share in the first step")
    share: float = option(0.001, "part of the parameters that is shut in the first step, which sets tau")
    new_word: bool = option(True, "the word is a new one, the class name's twin; false: it is one that the model knows, such as sks")
    prior: Prior = option("prediction", PRIOR)
    max_train_steps: int = option(50, "times that parameters are shut")
    train_batch_size: int = option(4, "samples that are computed at once")

    # Nothing takes steps: these are no options here.
    learning_rate: ClassVar = 0.0
    optimizer: ClassVar = "adamw"
    weight_decay: ClassVar = 0.0
    lr_scheduler: ClassVar = "constant"
    lr_warmup_steps: ClassVar = 0
    max_grad_norm: ClassVar = math.inf
    ema_decay: ClassVar = 0.0

    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2303.05125"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "tau")
        if not 0 < self.share < 1:
            raise UserError(f"share is {self.share}, needs more than 0 and less than 1; give a part such as 0.001")
        if self.tau is not None and self.changed(["share"]):
            raise UserError("share given with tau, where it has no effect; leave one of them out")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        subjects = self.subjects(task)
        classes = list(dict.fromkeys(subject.class_name for subject in subjects))
        if self.class_images is not None and len(classes) > 1:
            what = f"class_images are of one class, and the subjects are of {', '.join(classes)}"
            raise UserError(f"{what}; learn those of each class by themselves, and attach the edits together")
        masked = Masked(model, [f"{site}.weight" for site in model.arch.text_linears()], len(subjects))
        words = {subject.token: subject.class_name for subject in subjects} if self.new_word else {}
        with TokenRows(model, words, seed=self.seed).unlisted() as rows:
            text = Prompts(model.arch, self.cache)

            def denoising(subject: Subject) -> PreservedDenoising:
                own = (subject,)
                return PreservedDenoising(model, masked, text, self, own, Photos.of(model.arch, own, self, TEMPLATES, named))

            def edit(info: EditInfo) -> Edit:
                if not words:
                    return masked.edit(info)
                part = replace(info, on=(), triggers=(), config={}, notes={})
                return Chain.of([rows.edit(part), masked.edit(part)], info=info)

            implanting = Implanting(masked, [denoising(subject) for subject in subjects], self)
            with masked:
                yield implanting, edit

    @classmethod
    def example_task(cls, model: Model) -> CustomizeTask:
        """One picture that the package ships: the embedded world's sprites."""
        return CustomizeTask((Subject("<toy>", "picture", (ASSETS / "atlas.webp",)),))


class Implanting(Objective):
    """The concept-implanting losses of subjects, which take turns. Each is as it would be in a run of its own."""

    def __init__(self, masked: Masked, each: Sequence[PreservedDenoising], method: Cones) -> None:
        self.module = self.masked = masked
        self.each, self.method, self.turns = each, method, len(each)

    def optimizer(self, parameters: list[nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
        return Shutting(self.masked, self.method.share, self.method.tau)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        subject, own = self._turn(batch)
        self.masked.turn(subject)
        return self.each[subject].loss(own)

    def describe(self, batch: Batch) -> str:
        subject, own = self._turn(batch)
        return self.each[subject].describe(own)

    def _turn(self, batch: Batch) -> tuple[int, Batch]:
        return batch.step % self.turns, replace(batch, step=batch.step // self.turns)


class Masked(FullWeights):
    """Copies of named parameters, times a binary mask for each of several subjects, of which one acts at a time.

    kept: of each parameter [subjects, *shape] bool, M. tau: of each subject, not a number until it is known.
    """

    def __init__(self, model: Model, names: Sequence[str], subjects: int) -> None:
        super().__init__(model, names)
        self.kept = nn.ParameterList(
            nn.Parameter(torch.ones(subjects, *own.shape, dtype=torch.bool, device=own.device), requires_grad=False)
            for own in self._own.values()
        )
        self.tau: Tensor
        self.register_buffer("tau", torch.full((subjects,), math.nan, dtype=torch.float64))
        self.acting = 0
        self._shut = [torch.zeros((), device=own.device) for own in self._own.values()]
        if model.edits:  # what they add to a parameter is left of it when it is shut
            everything = Mask.from_masks({name: torch.zeros(own.shape) for name, own in self._own.items()})
            with model.attached(everything):
                self._shut = [own.detach().float().clone() for own in self._own.values()]

    def turn(self, subject: int) -> None:
        """Let the mask of this subject act."""
        self.acting = subject
        for copy, own, kept, shut in zip(self.copies, self._own.values(), self.kept, self._shut, strict=True):
            copy.data = torch.where(kept[subject], own.detach().float(), shut)

    @torch.no_grad()
    def shut(self, share: float, tau: float | None) -> None:
        """A step of the subject whose mask acts: shut what has h above tau, by the gradients of the copies. For the rest see `Cones`."""
        parameters = zip(self.copies, self._own.values(), self._shut, strict=True)
        h: list[Tensor] = [(own.detach().float() - shut) * copy.grad for copy, own, shut in parameters]
        known = self.tau[self.acting]
        if known.isnan():
            known.fill_(exceeded(h, share) if tau is None else tau)
        for kept, own in zip(self.kept, h, strict=True):
            kept[self.acting] &= ~(own > known.item())

    def edit(self, info: EditInfo) -> Mask:
        """The union of what is shut, with the taus, and with which part of all the parameters it is for each subject."""
        masks = []
        parts = []
        for subject in range(len(self.tau)):
            own = {name: kept[subject] for name, kept in zip(self._own, self.kept, strict=True)}
            masks.append(Mask.from_masks(own))
            whole = sum(kept.numel() for kept in own.values())
            parts.append(1 - sum(int(kept.sum()) for kept in own.values()) / whole)
            if not masks[-1].sites():
                what = f"no parameter's h was above tau {self.tau[subject].item():.3g}, so nothing is shut"
                raise UserError(f"{what}; give a smaller tau, or leave it out")
        return Mask.union(masks, replace(info, notes={**info.notes, "tau": self.tau.tolist(), "shut": parts}))


class Shutting(torch.optim.Optimizer):
    """The step of `Masked`, for the loop."""

    def __init__(self, masked: Masked, share: float, tau: float | None) -> None:
        super().__init__(masked.copies.parameters(), {"lr": 0.0})
        self.masked, self.share, self.tau = masked, share, tau

    def step(self, closure: Any = None) -> None:
        self.masked.shut(self.share, self.tau)


def exceeded(values: Sequence[Tensor], share: float) -> float:
    """What this share of all values is larger than (rounded up, at least one of them, unless they are alike), and not less than 0."""
    count = min(math.ceil(share * sum(each.numel() for each in values)) + 1, sum(each.numel() for each in values))
    largest = torch.cat([each.flatten().topk(min(count, each.numel())).values for each in values])
    return max(float(largest.topk(count).values[-1]), 0.0)
