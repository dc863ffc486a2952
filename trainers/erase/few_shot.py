"""Few-shot unlearning: the text encoder climbs the diffusion loss on a few pictures of the concept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.concepts import Concept, EraseTask, Task
from toolkit.method import option
from trainers.erase.options import TrainedOnPictures
from trainers.erase.pictures import Pictures
from trainers.erase.prompts import erase_task
from trainers.loop import Batch, LoopConfig, Objective
from trainers.weights import FullWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

BETAS, EPS = (0.9, 0.98), 1e-6  # of the optimizer


@dataclass(frozen=True)
class FewShot(TrainedOnPictures):
    """Erasing Concepts from Text-to-Image Diffusion Models with Few-shot Unlearning, Fuchi and Takagi, arXiv 2405.07288.

    Equation
        max_phi  E_{z, y, eps, t} || eps - e(z_t, t, c_phi(y)) ||^2,    z_t = alpha_t z + sigma_t eps,
        with z the latent of one of a few pictures of the concept, y a template around a word of the concept, t uniform, e the frozen
        denoiser, and c the text encoder, of which phi is the MLPs of every layer and the self-attention of the last. On a model that
        predicts velocity the same is done in velocities. There is no anchor: the concept goes where the loss drives it. The loss has
        no bound, so that the number of steps and their size decide how far. A loss that is not finite stops the run.

    Shapes
        z, eps: [batch, c, h', w'] scaled latents.

    Defaults
        10 steps of a batch of 2 are 5 rounds of 4 pictures, as in the official code, and so are the learning rate 1e-5, the weight
        decay 1e-8, the optimizer's betas 0.9, 0.98 and eps 1e-6, and no limit of the gradient's norm. They are made for Stable
        Diffusion 1. Where a concept is still there, give more steps or larger ones; where other things go too, fewer.

    Deviations
        Without `images` the model draws the pictures itself, as it is before training: the official code needs real ones, and where
        it has none it takes uniform noise for latents. Latents are not decoded and encoded again on the way. AdamW takes the place of
        Adam, which at this weight decay is the same. Templates are the task's or the concept's own and not the 27 (19 for styles) of
        CLIP's, some of which ("cropped", "dirty") say what need not be true; every synonym is trained beside the name. The posterior's
        mean is encoded, without the official code's flip of each picture: templates may name sides. Where a layer of the encoder is
        read by nobody (the last of the first encoder of Stable Diffusion XL) it is left out, and "the last" is the last that is read;
        the official code finds it by its number, 11, which is the last of Stable Diffusion 1 alone. Pictures come in turn, in
        an order that is drawn anew each round, also where a round ends within a batch.
    """

    n_images: int = option(4, "pictures that the model draws of each concept, without images")
    max_train_steps: int = option(10, "optimizer steps")
    train_batch_size: int = option(2, "pictures that are computed at once")
    learning_rate: float = option(1e-5, "step size")
    weight_decay: float = option(1e-8, "of the optimizer")
    max_grad_norm: float = option(math.inf, "largest norm of the gradient; inf: any")

    paper: ClassVar = "arXiv:2405.07288"

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        ascent = Ascent(model, self, erase_task(task, None, anchors=False))
        with ascent.weights:
            yield ascent, ascent.weights.edit

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """Two objects."""
        return EraseTask((Concept("cat"), Concept("bird")))


class Ascent(Objective):
    """The denoiser's error on pictures of the concepts, with its sign turned, as a function of the text encoder."""

    def __init__(self, model: Model, method: FewShot, task: EraseTask) -> None:
        self.module = self.weights = FullWeights(model, model.arch.encoder_mlps_and_last_attention())
        self.arch, self.method = model.arch, method
        self.pictures = Pictures.of(model, method, task)

    def optimizer(self, parameters: list[nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
        made = super().optimizer(parameters, replace(config, betas=BETAS))
        for group in made.param_groups:
            group["eps"] = EPS
        return made

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        seen = self.pictures.noised("few_shot", self.method.seed, batch, self.method.train_batch_size)
        output = self.arch.predict(seen.latents, seen.t, self.arch.encode(seen.prompts, grad=True))
        return -F.mse_loss(output, seen.target), {}
