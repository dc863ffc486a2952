"""What methods that learn subjects from pictures share: their options, the pictures as samples, and the denoiser's error on them."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.arch.text import Text
from toolkit.cache import cached
from toolkit.concepts import CustomizeTask, Subject, Task, expect
from toolkit.errors import UserError
from toolkit.fingerprint import image_fingerprint, text_fingerprint
from toolkit.method import option
from toolkit.runs import seeded
from trainers.loop import Batch, Objective
from trainers.method import Trained
from trainers.photos import bucket_of, load_masks, load_photos, to_latents
from trainers.timesteps import timesteps

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture

BUCKETS = 8  # sizes of the sides of buckets are multiples of a model's own size divided by this


@dataclass(frozen=True)
class Learned(Trained, ABC):
    """Base of the methods that learn subjects; its options are theirs."""

    templates: tuple[str, ...] = option((), "prompts with {} for the word, for pictures without a caption; empty: built in")
    timestep_sampling: Literal["uniform", "stratified", "cubic"] = option("stratified", "cubic prefers noisy ones")
    snr_gamma: float = option(0.0, "min-SNR weighting of the noise levels (arXiv 2303.09556), 5 in its paper; 0: none")
    mask_normalization: Literal["mask", "image"] = option("mask", "with masks, what the error is averaged over: the mask, or all")
    aspect_buckets: bool = option(False, "keep pictures' proportions, in groups of one size, instead of cutting out squares")
    cache: Literal["memory", "disk", "no"] = option("memory", "where encoded pictures and prompts are kept; no: encode at each use")

    kind: ClassVar = "customize"
    finds: ClassVar[bool] = False  # it finds what a picture shows, and a task's one token is the stem of the words for it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "snr_gamma")
        for template in self.templates:
            if "{}" not in template:
                raise UserError(f"template {template!r} has no place for the word; write {{}} where it goes")

    def subjects(self, task: Task) -> tuple[Subject, ...]:
        """Those of the task, which must be one to learn some. Options about masks that it has none of are a UserError."""
        task = expect(CustomizeTask, task)
        if unknown := [subject.token for subject in task.subjects if not subject.class_name.strip()]:
            raise UserError(f"no class name given for {unknown[0]}, and {self.name()} learns what it is one of; give one such as dog")
        if self.changed(["mask_normalization"]) and not self.masked(task.subjects):
            raise UserError(f"mask_normalization {self.mask_normalization} has no effect without masks; give masks, or leave it out")
        return task.subjects

    def masked(self, subjects: Sequence[Subject]) -> bool:
        """Whether there are masks that the error counts on."""
        return any(subject.masks for subject in subjects)


@dataclass(frozen=True)
class Samples:
    """A part of a step's batch. rows: numbers of pictures. latents, noise: [n, c, h', w']. weights: [n, 1, h', w']. t: [n]."""

    rows: Sequence[int]
    prompts: Sequence[str]
    latents: Tensor
    weights: Tensor
    noise: Tensor
    t: Tensor


@dataclass(frozen=True)
class Seen:
    """A picture as it is trained on once. latent: [1, c, h', w']. weight: what the error counts at each place, [1, 1, h', w']."""

    prompt: str
    latent: Tensor
    weight: Tensor


class Pool(ABC):
    """Pictures of which every step draws some.

    captions: for each the prompts that it may be trained with. sizes: for each the (height, width) of its group: those of a batch are of
    one. names: for messages.
    """

    def __init__(
        self, arch: Architecture, names: Sequence[str], captions: Sequence[tuple[str, ...]], sizes: Sequence[tuple[int, int]]
    ) -> None:
        self.arch, self.names, self.captions, self.sizes = arch, names, captions, sizes
        self.groups = {size: [row for row, own in enumerate(sizes) if own == size] for size in dict.fromkeys(sizes)}

    @abstractmethod
    def at(self, row: int, prompt: str, draw: torch.Generator) -> Seen:
        """A picture as a sample that is to be trained with this prompt. draw: what is drawn for it, if anything."""

    def draw(self, key: str, method: Learned, batch: Batch) -> Samples:
        """A part of a step's batch: pictures of one size, each as often as the others up to one; everything is keyed by the step."""
        (draw, chosen, prompts), own = self._chosen(key, method, batch), list(batch.places(method.train_batch_size))
        keys = [(f"{key} picture", method.seed, batch.step, place) for place in own]
        self.ready([chosen[i] for i in own])
        seen = [self.at(chosen[i], prompts[i], seeded(*of)) for i, of in zip(own, keys, strict=True)]
        latents, weights = torch.cat([one.latent for one in seen]), torch.cat([one.weight for one in seen])
        noise = torch.randn((len(chosen), *latents.shape[1:]), generator=draw)[own].to(latents)
        t = timesteps(method.timestep_sampling, len(chosen), self.arch.train_timesteps, draw)[own].to(latents.device)
        return Samples([chosen[i] for i in own], [one.prompt for one in seen], latents, weights, noise, t)

    def ready(self, rows: Sequence[int]) -> None:
        """What is to be done at once for the pictures of a step, before `at` is asked for each. Default: nothing."""

    def captions_of_step(self, key: str, method: Learned, batch: Batch) -> list[str]:
        """The captions that `draw` draws for all samples of a step, of which the batch is a part."""
        return self._chosen(key, method, batch)[2]

    def _chosen(self, key: str, method: Learned, batch: Batch) -> tuple[torch.Generator, list[int], list[str]]:
        """The pictures of a whole step and a caption for each; with the generator, for what is drawn after them."""
        draw, group = seeded(key, method.seed, batch.step), self._group(key, method.seed, batch.step)
        chosen = [group[i] for i in evenly(len(group), batch.parts * method.train_batch_size, draw).tolist()]
        return draw, chosen, [self.captions[i][int(torch.randint(len(self.captions[i]), (), generator=draw))] for i in chosen]

    def _group(self, key: str, seed: int, step: int) -> list[int]:
        """The pictures of one size; a size comes up as often as it has pictures."""
        place = int(torch.randint(len(self.sizes), (), generator=seeded(f"{key} size", seed, step)))
        return self.groups[self.sizes[place]]


class Drawings(Pool):
    """Pictures of the model's own size that are latents [n, c, h', w'] already, each with its prompt."""

    def __init__(self, arch: Architecture, prompts: Sequence[str], latents: Tensor) -> None:
        side = arch.image_size
        super().__init__(
            arch, [f"a drawing of {prompt!r}" for prompt in prompts], [(prompt,) for prompt in prompts], [(side, side)] * len(prompts)
        )
        self.latents = latents

    def at(self, row: int, prompt: str, draw: torch.Generator) -> Seen:
        latent = self.latents[row : row + 1]
        return Seen(prompt, latent, torch.ones_like(latent[:, :1]))


class Photos(Pool):
    """A subject's picture files.

    masks: a file for each, or None. For cache, buckets and normalization see `Learned`.
    """

    def __init__(
        self, arch: Architecture, paths: Sequence[Path], captions: Sequence[tuple[str, ...]], masks: Sequence[Path | None], method: Learned
    ) -> None:
        side = arch.image_size
        step = math.ceil(side / BUCKETS / arch.downscale) * arch.downscale
        sizes = [bucket_of(path, side, step) if method.aspect_buckets else (side, side) for path in paths]
        super().__init__(arch, [str(path) for path in paths], captions, sizes)
        self.paths, self.masks, self.method = paths, masks, method
        self._encoder = image_fingerprint(arch) if method.cache == "disk" else ""
        read = {row: self._read(row) for row in range(len(paths))}  # also without a cache: what is wrong with a picture is said at once
        self._kept = read if method.cache != "no" else {}

    @classmethod
    def of(
        cls,
        arch: Architecture,
        subjects: Sequence[Subject],
        method: Learned,
        templates: Sequence[str],
        word: Callable[[Subject], str] = lambda subject: subject.token,
    ) -> Self:
        """All of these subjects, with their captions or else the templates (the method's own, if it is given some) around their words."""
        filled = [(subject, tuple(one.format(word(subject)) for one in method.templates or templates)) for subject in subjects]
        captions = [choices for subject, own in filled for choices in captions_of(subject, own)]
        paths = [path for subject in subjects for path in subject.images]
        masks = [mask for subject in subjects for mask in (subject.masks or [None] * len(subject.images))]
        return cls(arch, paths, captions, masks, method)

    def at(self, row: int, prompt: str, draw: torch.Generator) -> Seen:
        return Seen(prompt, *self.encoded(row))

    def encoded(self, row: int) -> tuple[Tensor, Tensor]:
        """A picture's latent [1, c, h', w'], and what the error counts at each place by its own mask [1, 1, h', w']."""
        return self._kept[row] if row in self._kept else self._read(row)

    def ready(self, rows: Sequence[int]) -> None:
        if self.method.cache == "no":
            distinct = list(dict.fromkeys(rows))
            latents = to_latents(self.arch, load_photos([self.paths[row] for row in distinct], self.sizes[distinct[0]]))
            self._kept = {row: self._weighted(row, latent[None]) for row, latent in zip(distinct, latents, strict=True)}

    def _read(self, row: int) -> tuple[Tensor, Tensor]:
        path, size = self.paths[row], self.sizes[row]

        def encoded() -> Tensor:
            return to_latents(self.arch, load_photos([path], size))

        if self.method.cache == "disk":
            key = [self._encoder, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(), size]
            latent = cached("latents", key, lambda: {"latent": encoded()})["latent"].to(self.arch.device)
        else:
            latent = encoded()
        return self._weighted(row, latent)

    def _weighted(self, row: int, latent: Tensor) -> tuple[Tensor, Tensor]:
        """A picture's latent, and what the error counts at each place by its own mask."""
        path, size, mask = self.paths[row], self.sizes[row], self.masks[row]
        if mask is None:
            return latent, torch.ones_like(latent[:, :1])
        weight = F.interpolate(load_masks([mask], [path], size), latent.shape[-2:], mode="area").to(latent)
        return latent, weight / weight.mean() if self.method.mask_normalization == "mask" else weight


class Prompts:
    """Encoded prompts, each encoded once while the text encoders stay as they are.

    grad: they do not: each prompt is encoded anew with the graph. cache: as `Learned.cache`.
    """

    def __init__(self, arch: Architecture, cache: Literal["memory", "disk", "no"], *, grad: bool = False) -> None:
        self.arch, self.cache, self.grad = arch, "no" if grad else cache, grad
        self._encoder = text_fingerprint(arch) if self.cache == "disk" else ""
        self._known: dict[str, Text] = {}

    def __call__(self, prompts: Sequence[str]) -> Text:
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        if self.cache == "no":
            return self.arch.encode(distinct, grad=self.grad)[rows]
        for prompt in distinct:
            if prompt not in self._known:
                self._known[prompt] = self._encoded(prompt)
        return Text.cat([self._known[prompt] for prompt in distinct])[rows]

    def _encoded(self, prompt: str) -> Text:
        if self.cache == "memory":
            return self.arch.encode([prompt])
        made = cached("prompts", [self._encoder, prompt], lambda: self.arch.encode([prompt]).tensors())
        return Text(**made).to(self.arch.device)


class Denoising(Objective):
    """The denoiser's error on pictures."""

    def __init__(self, module: nn.Module, pictures: Pool, text: Callable[[Sequence[str]], Text], method: Learned) -> None:
        self.module, self.pictures, self.text, self.method = module, pictures, text, method
        self.arch = pictures.arch

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return self.loss_of(self.samples(batch), batch)

    def loss_of(self, samples: Samples, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss on these samples, which are those of the batch."""
        return self.learnt(samples, self.output(self.noisy(samples), samples.t, samples.prompts)), {}

    def output(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the denoiser gives as it is now. In each step it is called first with what is learnt, which may be followed by more."""
        return self.arch.predict(noisy, t, self.text(prompts))

    def samples(self, batch: Batch) -> Samples:
        """Those of a part of a step's batch."""
        return self.pictures.draw(self.method.name(), self.method, batch)

    def noisy(self, samples: Samples) -> Tensor:
        """z_t."""
        return self.arch.add_noise(samples.latents, samples.noise, samples.t)

    def learnt(self, samples: Samples, output: Tensor) -> Tensor:
        """What the loss has of the subjects' own samples, for which the denoiser gave this: the error."""
        return self.error(samples, output)

    def error(self, samples: Samples, output: Tensor) -> Tensor:
        """What the denoiser gave, against what it should have given: the weighted mean square."""
        square = (output - self.arch.target(samples.latents, samples.noise, samples.t)).square()
        return (samples.weights * min_snr(self.arch, samples.t, self.method.snr_gamma) * square).mean()

    def describe(self, batch: Batch) -> str:
        return ", ".join(dict.fromkeys(self.pictures.names[row] for row in self.samples(batch).rows))


def min_snr(arch: Architecture, t: Tensor, gamma: float) -> Tensor:
    """What the error counts at timesteps t [n, 1, 1, 1]: min(SNR, gamma) of the clean image's error, in terms of the denoiser's own output.

    Hang et al., arXiv 2303.09556: min(SNR, gamma) / SNR for a denoiser that predicts noise, / (SNR + 1) for one that predicts velocity.
    gamma 0 is 1 everywhere.
    """
    if not gamma:
        return torch.ones_like(t, dtype=torch.float32).view(-1, 1, 1, 1)
    alpha, sigma = (part.float() for part in arch.signal_and_noise(t))
    zero = torch.zeros_like(alpha)
    of_output = arch.to_x0(torch.ones_like(alpha), zero, t) - arch.to_x0(zero, zero, t)  # how much of its error is the clean image's
    return (alpha / sigma).square().clamp(max=gamma) * of_output.float().square()


def captions_of(subject: Subject, filled: tuple[str, ...]) -> list[tuple[str, ...]]:
    """For every picture the prompts it may be trained with: its own caption, or the templates with the word put in."""
    return [(caption,) for caption in subject.captions] or [filled] * len(subject.images)


def evenly(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` of `count` numbers, each as often as the others up to one."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(math.ceil(size / count))]
    return torch.cat(rounds)[:size]
