"""Textual inversion: a new word for a subject, found by gradient descent on its embedding alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.concepts import CustomizeTask, Subject, Task
from toolkit.errors import UserError
from toolkit.method import Score, TrainedMethod, option
from toolkit.prompt_search import TokenRows
from toolkit.runs import TrainingRun, seeded
from toolkit.world.scenes import ASSETS
from trainers.loop import Batch, LoopConfig, Objective, train
from trainers.method import run_of, samples, summary
from trainers.photos import load_masks, load_photos, to_latents
from trainers.timesteps import timesteps

if TYPE_CHECKING:
    from toolkit.edits.token import TokenEdit
    from toolkit.model import Model

TEMPLATES = {
    "object": ("a {}", "a photo of a {}", "a picture of a {}", "a rendering of a {}", "a depiction of a {}", "a photo of one {}"),
    "style": ("in the style of {}", "a picture in the style of {}", "a painting in the style of {}", "a rendering in the style of {}"),
}


@dataclass(frozen=True)
class TextualInversion(TrainedMethod):
    """An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion, Gal et al., arXiv 2208.01618.

    Equation
        v* = argmin_v E_{z, y, eps, t} || eps - eps_theta(z_t, t, c(y; v)) ||^2,    z_t = alpha_t z + sigma_t eps,
        where z is the latent of a picture of the subject, y a caption with the new word, v the word's embedding and c the
        text encoder; everything but v is frozen. With a model that predicts velocity the same is done in velocities.

    Shapes
        v: [vectors, d] for each word, d the width of the token embedding. z, eps: [batch, c, h', w'] scaled latents.

    Defaults
        learning_rate 0.005 and a batch of 4, constant, AdamW, as in the paper; there the rate is further multiplied by the
        batch size and the number of GPUs to 0.04, and 5000 steps are taken. max_train_steps 500 is chosen by us for the
        embedded model: give 2000 to 5000 for photographs.

    Deviations
        Only new rows exist as parameters, where the official code trains the table and restores the other rows.
        A picture's own caption is used when it has one, else a template; the templates are fewer than the official 27,
        without its "cropped", "dark" and the like, which say things about a picture that need not be true. No random
        flip: captions may name sides. The posterior's mean is encoded, once, not a new sample in every step. Timesteps are
        stratified over the batch by default: each is still uniform, with less variance between steps. With masks the
        error counts on the subject only, divided by its area. Several vectors, also in the paper's appendix, start from
        the class name's tokens in turn.
    """

    num_vectors: int = option(1, "embedding vectors for each new word")
    initializer_token: str | None = option(None, "word or phrase to start from; none is the subject's class name")
    learnable_property: Literal["object", "style"] = option("object", "what is learned, which decides the templates")
    templates: tuple[str, ...] = option((), "prompts with {} for the word, for pictures without a caption; empty: built in")
    max_train_steps: int = option(500, "optimizer steps")
    train_batch_size: int = option(4, "pictures in a step")
    learning_rate: float = option(5e-3, "step size of AdamW")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = option("constant", "how it changes")
    lr_warmup_steps: int = option(0, "steps in which it grows from 0; needs another lr_scheduler than constant")
    timestep_sampling: Literal["uniform", "stratified", "cubic"] = option("stratified", "cubic prefers noisy ones")
    mixed_precision: Literal["no", "bf16", "auto"] = option("no", "auto is bf16 where the hardware computes in it")
    seed: int = option(0, "of everything that is drawn")

    kind: ClassVar = "customize"
    architectures: ClassVar = ("sd",)
    paper: ClassVar = "arXiv:2208.01618"
    training_free: ClassVar = False

    def __post_init__(self) -> None:
        for name in ("num_vectors", "max_train_steps", "train_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, needs at least 1; give a larger number")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise UserError("lr_warmup_steps has no effect with lr_scheduler constant; give constant_with_warmup")
        for template in self.templates:
            if "{}" not in template:
                raise UserError(f"template {template!r} has no place for the word; write {{}} where it goes")

    def fit(self, model: Model, task: Task, *, score: Score | None = None, run: TrainingRun | None = None) -> TokenEdit:
        """Train every subject's word together. There are no candidates to choose among, so `score` is not called."""
        if not isinstance(task, CustomizeTask):
            raise UserError(f"given a {type(task).__name__}, needs a CustomizeTask; textual inversion learns subjects")
        start = {subject.token: self.initializer_token or subject.class_name for subject in task.subjects}
        settings = LoopConfig(
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            lr_scheduler=self.lr_scheduler,
            lr_warmup_steps=self.lr_warmup_steps,
            max_grad_norm=math.inf,
            betas=(0.9, 0.999),
            mixed_precision=self.mixed_precision,
            seed=self.seed,
        )
        began = time.perf_counter()
        with TokenRows(model, start, vectors=self.num_vectors, seed=self.seed) as rows:
            objective, after, of = Denoising(model, rows, self, task.subjects), samples(model, run), run_of(self, model, task)
            losses = train(objective, settings, run, title=self.name(), after=after, in_place=True, quiet=True, of=of)
        notes = {"seconds": round(time.perf_counter() - began, 3), "steps": self.max_train_steps, "loss": summary(losses)}
        return rows.edit(model.info(self, tuple(start), notes))

    @classmethod
    def example_task(cls, model: Model) -> CustomizeTask:
        """One picture that the package ships: the embedded world's sprites."""
        return CustomizeTask((Subject("<toy>", "picture", (ASSETS / "atlas.webp",)),))


class Denoising(Objective):
    """The denoiser's error on the subjects' pictures, as a function of the words' rows."""

    def __init__(self, model: Model, rows: TokenRows, method: TextualInversion, subjects: Sequence[Subject]) -> None:
        self.module, self.arch, self.method = rows, model.arch, method
        self.captions = [choices for subject in subjects for choices in captions(subject, method)]
        paths = [image for subject in subjects for image in subject.images]
        self.latents = to_latents(model.arch, load_photos(paths, model.arch.image_size))
        self.weights = torch.cat([weights(subject, model.arch.image_size, self.latents) for subject in subjects])

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        draw, own = seeded("textual inversion", self.method.seed, batch.step), list(batch.places(self.method.train_batch_size))
        count = batch.parts * len(own)  # everything is drawn for the whole step, of which this is a part
        chosen = evenly(len(self.latents), count, draw)
        prompts = [self.captions[i][int(torch.randint(len(self.captions[i]), (), generator=draw))] for i in chosen]
        noise = torch.randn((count, *self.latents.shape[1:]), generator=draw)[own].to(self.latents)
        t = timesteps(self.method.timestep_sampling, count, self.arch.train_timesteps, draw)[own].to(self.latents.device)
        chosen, prompts = chosen[own], [prompts[i] for i in own]
        z = self.latents[chosen]
        distinct = list(dict.fromkeys(prompts))
        text = self.module(distinct)[torch.tensor([distinct.index(prompt) for prompt in prompts])]
        output = self.arch.predict(self.arch.add_noise(z, noise, t), t, text)
        error = (output - self.arch.target(z, noise, t)).square()
        return (self.weights[chosen] * error).mean(), {}


def captions(subject: Subject, method: TextualInversion) -> list[tuple[str, ...]]:
    """For every picture the prompts it may be trained with: its own caption, or the templates with the word put in."""
    if subject.captions:
        return [(caption,) for caption in subject.captions]
    templates = method.templates or TEMPLATES[method.learnable_property]
    return [tuple(template.format(subject.token) for template in templates)] * len(subject.images)


def weights(subject: Subject, size: int, latents: Tensor) -> Tensor:
    """What the error at each place of a latent counts [n, 1, h', w'], of mean 1: its mask, or 1 everywhere."""
    if not subject.masks:
        return torch.ones(len(subject.images), 1, *latents.shape[-2:], device=latents.device)
    masks = F.interpolate(load_masks(subject.masks, subject.images, size), latents.shape[-2:], mode="area")
    return (masks / masks.mean((1, 2, 3), keepdim=True)).to(latents.device)


def evenly(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` of `count` numbers, each as often as the others up to one."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(math.ceil(size / count))]
    return torch.cat(rounds)[:size]
