"""TRCE: what the text says of a concept is rewritten in closed form, then early denoising is trained to turn to what is safe."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.closed_form.trce_embedding import TRCEEmbedding
from toolkit.arch.text import Text
from toolkit.concepts import Concept, EraseTask, Task, expect
from toolkit.edits.chain import Chain
from toolkit.errors import UserError
from toolkit.method import option
from trainers.erase.options import TrainedOnDrawings, drawing_options
from trainers.erase.prompts import concept_prompts, one_each
from trainers.erase.samples import TrajectorySteps
from trainers.loop import Batch, Objective
from trainers.trajectories import Trajectories
from trainers.weights import FullWeights

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

KEPT = 4  # samples without a prompt beside each of the concept's


@dataclass(frozen=True)
class TRCE(TrainedOnDrawings):
    """TRCE: Towards Reliable Malicious Concept Erasure in Text-to-Image Diffusion Models, Chen et al., arXiv 2503.07389.

    Both stages: `trce_embedding`, which solves for the keys and values of the cross-attention, and on top of it what is trained here,
    the self-attention and the queries of the cross-attention.

    Equation
        min_theta  E_{x_t, t} 1/2 sum_{e in {e_theta(x_t, c, t), e_theta(x_t, t)}} max(0, || e - prefer ||^2 - || e - reject ||^2 + m)
                 + u E_{y_t, t} || e_theta(y_t, t) - e1(y_t, t) ||^2
        prefer = e*(x_t, s, t) + eta (e*(x_t, s, t) - e*(x_t, t))
        reject = e*(x_t, c, t) + eta (e*(x_t, c, t) - e*(x_t, t))
        with e* the frozen model, e1 the same after the first stage, where e_theta starts, c the concept's prompt, s the same with its
        anchor, x_t what e* has denoised of c so far at a uniform one of the early steps, and y_t what e1 has denoised without a prompt
        at a uniform step, of which there are 4 for each x_t. || ||^2 is the mean over a latent. On a model that predicts velocity the
        same is done in velocities.

    Shapes
        e, x_t, y_t, prefer, reject: [batch, c, h', w']; the denoiser is run on batch * 6 of them.

    Defaults
        The official code's for sexual content: eta 15, margin m 0.01, the weight u 100, AdamW at 1e-6 for 300 steps with one sample each
        (100 drawings, three times), 50 steps of the sampler at guidance 3 of which the first half is early, preserve_scale 0.01.
        lamb and the rest of the first stage are as in `trce_embedding`.

    Deviations
        The official code never zeroes its gradients, so that every step goes along the sum of all before; here each step has its own.
        It keeps latents after the sampler's step and reads them at the timestep before; here each is read at its own. It draws
        2000 images without a prompt, by the frozen model; here `trajectories` of them, by the model after the first stage, whose own
        predictions are then the target without a pass for each step. Drawings and timesteps are drawn for each sample, where it goes
        through all drawings three times. Its factor beta, 1, around what the max is taken of only scales it and is left out, as is a
        constant that is added to the second term. The sampler is the family's own solver instead of DDIM. Prompts are
        the task's templates around the concept's words; the official code takes 20 phrases for sexual content, here synonyms.
        A concept without an anchor, which the paper does not have, has no prompt for s and is turned away from itself:
        prefer = e*(x_t, t) - eta (e*(x_t, c, t) - e*(x_t, t)), as in ESD. The paper's own formula would give prefer = e*(x_t, t) there,
        which is nearer to e*(x_t, c, t) than reject is as soon as eta is over 1, so that nothing would be learned. What the task
        preserves is kept by the first stage alone; the second keeps what is predicted without a prompt.
    """

    eta: float = option(15.0, "how far the preferred prediction is beyond the anchor's, and the rejected one beyond the concept's")
    margin: float = option(0.01, "by how much a prediction is to be nearer to the preferred than to the rejected one")
    unconditional_weight: float = option(100.0, "weight of predictions without a prompt staying as they are")
    early: float = option(0.5, "part of the sampler's steps, from the first, that the concept is unlearned at")
    trajectories: int = option(100, "drawings of the concept whose early steps are trained on, and as many without a prompt")
    preserve_scale: float = option(0.01, "weight of each kept prompt in the first stage")
    lamb: float = option(0.5, "weight of staying close to the given weights in the first stage; 0 needs many preserved prompts")
    max_train_steps: int = option(300, "optimizer steps")
    learning_rate: float = option(1e-6, "step size")

    paper: ClassVar = "arXiv:2503.07389"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.more_than(1, "guidance")  # the prediction without a prompt is a part of the target
        self.at_least(0, "eta", "margin", "unconditional_weight")
        if not 0 < self.early <= 1:
            raise UserError(f"early is {self.early}, needs more than 0 up to 1; give such a number")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        task, on = expect(EraseTask, task), model.info(self).on
        one_each(self.trajectories, task)
        first = TRCEEmbedding(preserve_scale=self.preserve_scale, lamb=self.lamb).fit(model, task)
        drawn = early_steps(model, self, task)
        with model.attached(first):
            steering = Turning(model, self, drawn)

            def both(info: EditInfo) -> Chain:
                return Chain.of((first, steering.weights.edit(info)), info=replace(info, on=on))

            with steering.weights:
                yield steering, both

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with an anchor, and one without."""
        return EraseTask((Concept("cat", anchor="dog"), Concept("bird")), preserve=("cow",))


class Turning(Objective):
    """By how much the prediction is not yet nearer to what is preferred, and how far it went where nothing is asked.

    To be made where the first stage is attached. drawn: see `early_steps`.
    """

    def __init__(self, model: Model, method: TRCE, drawn: TrajectorySteps) -> None:
        self.module = self.weights = FullWeights(model, trained_names(model.arch))
        self.arch, self.method, self.drawn = model.arch, method, drawn
        self.nothing = model.arch.encode_negative([""])
        self.kept = None
        if method.unconditional_weight:
            blank = [""] * method.trajectories
            seeds = range(method.seed, method.seed + len(blank))
            seen = Trajectories.of(model, blank, seeds, **drawing_options(method, model))
            self.kept = TrajectorySteps(model.arch, blank, seen.latents, seen.t, seen.outputs["negative"])

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        method, device = self.method, self.arch.device
        places = batch.places(method.train_batch_size)
        key = (method.seed, batch.step)
        rows, steps = zip(*(self.drawn.pick("erase", *key, place) for place in places), strict=True)
        latents, t, asked, target = self.drawn.at(rows, steps, device)
        latents, t, prompted = torch.cat([latents, latents]), torch.cat([t, t]), len(latents)
        stays = target[:0, 0]
        if self.kept is not None:
            rows, steps = zip(*(self.kept.pick("keep", *key, place, i) for place in places for i in range(KEPT)), strict=True)
            calm, when, _, stays = self.kept.at(rows, steps, device)
            latents, t = torch.cat([latents, calm]), torch.cat([t, when])
        unasked = self.nothing[torch.zeros(len(latents) - prompted, dtype=torch.long, device=device)]
        turned, stayed = self.arch.predict(latents, t, Text.cat([asked, unasked])).split([2 * prompted, len(stays)])
        prefer, reject = (distance(turned, side.repeat(2, 1, 1, 1)) for side in target.unbind(1))
        erase = (prefer - reject + method.margin).relu().mean()
        if self.kept is None:
            return erase, {}
        keep = F.mse_loss(stayed, stays)
        return erase + method.unconditional_weight * keep, {"erase": erase.item(), "keep": keep.item()}


def early_steps(model: Model, method: TRCE, task: EraseTask) -> TrajectorySteps:
    """The early steps of drawings of the concepts. Target: what is preferred there, and what is rejected [n, steps, 2, c, h', w'].

    Nothing to learn there is warned of.
    """
    prompts, safe = zip(*islice(cycle(concept_prompts(task)), method.trajectories), strict=True)
    seeds = range(method.seed, method.seed + len(prompts))
    seen = Trajectories.of(model, prompts, seeds, beside={"safe": safe}, **drawing_options(method, model))
    early = slice(math.ceil(method.early * method.sampling_steps))
    anchor, concept, nothing = (seen.outputs[name][:, early] for name in ("safe", "prompt", "negative"))
    anchored = torch.tensor([bool(prompt) for prompt in safe]).view(-1, 1, 1, 1, 1)
    prefer = torch.where(anchored, anchor + method.eta * (anchor - nothing), nothing - method.eta * (concept - nothing))
    reject = concept + method.eta * (concept - nothing)
    if not any((distance(side, prefer) - distance(side, reject) + method.margin > 0).any() for side in (concept, nothing)):
        what = f"eta {method.eta:g} and margin {method.margin:g}: all predictions are nearer to what is preferred from the start"
        warnings.warn(f"{what}, so that nothing is learned; raise margin, lower eta, or choose another anchor", stacklevel=2)
    return TrajectorySteps(model.arch, prompts, seen.latents[:, early], seen.t[early], torch.stack([prefer, reject], 2))


def distance(one: Tensor, other: Tensor) -> Tensor:
    """The mean squared difference over the last three axes."""
    return F.mse_loss(one, other, reduction="none").flatten(-3).mean(-1)


def trained_names(arch: Architecture) -> list[str]:
    """The denoiser's parameters that are trained: those of the self-attention, and the queries of the cross-attention."""
    cross = arch.cross_attention_sites()
    chosen = tuple(f"{site}.to_q." if site in cross else f"{site}." for site in arch.attention_sites())
    return [name for part, _ in arch.components()["denoiser"].named_parameters() if (name := f"denoiser.{part}").startswith(chosen)]
