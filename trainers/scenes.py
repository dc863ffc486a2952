"""Pictures in which several subjects are seen together, and what the denoiser attends to while it learns them.

Subjects that name the same picture file are in it together. A sample is a picture and some of its subjects, and its prompt
names these. A subject may name a file several times, with another caption each time: of itself alone, and of it beside others.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.attention import AttentionMaps, attention_maps, grid_of, token_mask
from toolkit.concepts import Subject, named
from toolkit.errors import UserError
from trainers.loop import Batch
from trainers.photos import load_masks
from trainers.preservation import PreservedDenoising, without_token
from trainers.subjects import Denoising, Learned, Photos, Samples, Seen

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture

Choices = Callable[[int], Sequence[tuple[int, ...]]]
"""How many subjects a picture has -> some of them, by number, as often as they are to be chosen."""


class Scenes(Photos):
    """Pictures with the subjects that are in each.

    templates: prompts with {} for all subjects of a sample. choices: which subjects are in one. Where subjects have captions of a picture,
    these stand for both: it has those of all of them, each as often as the others, and each names the subjects of a sample itself.
    members: of each picture. masks_of: of each picture, for each of its subjects its mask [1, 1, h', w'] at the latent's places, or
    None. asked: prompt -> the subjects that it names. The error counts where one of these is; without masks everywhere.
    """

    def __init__(
        self,
        arch: Architecture,
        subjects: Sequence[Subject],
        method: Learned,
        templates: str | Sequence[str],
        choices: Choices,
        word: Callable[[Subject], str] = lambda subject: subject.token,
    ) -> None:
        found: dict[Path, dict[Subject, Path | None]] = {}
        said: dict[Path, list[str]] = {}
        for subject in subjects:
            nothing = [None] * len(subject.images)
            for image, mask, caption in zip(subject.images, subject.masks or nothing, subject.captions or nothing, strict=True):
                if found.setdefault(image, {}).setdefault(subject, mask) != mask:
                    raise UserError(f"{image} is given twice for {subject.token} with different masks; give it one")
                said.setdefault(image, []).extend([] if caption is None else [caption])
        self.members = [list(inside) for inside in found.values()]
        self.asked: dict[str, tuple[Subject, ...]] = {}
        captions, forms = [], (templates,) if isinstance(templates, str) else templates
        for image, members in zip(found, self.members, strict=True):
            if given := said[image]:
                prompts = list(dict.fromkeys(given))
                some = named_in(prompts, members, subjects, image)
            else:
                filled = [(tuple(members[i] for i in chosen), form) for chosen, form in product(choices(len(members)), forms)]
                some, prompts = [names for names, _ in filled], [form.format(" and ".join(map(word, names))) for names, form in filled]
            self.asked |= dict(zip(prompts, some, strict=True))
            captions.append(tuple(prompts))
        super().__init__(arch, list(found), captions, [None] * len(found), method)
        self.masks_of = [
            [None if mask is None else self._mask(mask, image, row) for mask in inside.values()]
            for row, (image, inside) in enumerate(found.items())
        ]

    def whole(self, row: int) -> str:
        """A prompt of a picture that names all its subjects; that there is none is a UserError."""
        for prompt in self.captions[row]:
            if set(self.asked[prompt]) == set(self.members[row]):
                return prompt
        words = ", ".join(subject.token for subject in self.members[row])
        raise UserError(f"no caption of {self.names[row]} names all of {words}, which are told apart by one; give one that does, or masks")

    def at(self, row: int, prompt: str, draw: torch.Generator) -> Seen:
        one = super().at(row, prompt, draw)
        masks = self.masks_in(row, prompt)
        if not masks:
            return one
        weight = torch.stack(masks).amax(0).to(one.latent)
        return Seen(prompt, one.latent, weight / weight.mean() if self.method.mask_normalization == "mask" else weight)

    def masks_in(self, row: int, prompt: str) -> list[Tensor]:
        """The masks in a picture of the subjects that a prompt names, of those that have one."""
        return [mask for mask in self.each_mask(row, prompt) if mask is not None]

    def each_mask(self, row: int, prompt: str) -> list[Tensor | None]:
        """The same for each of these subjects, None of one that has none."""
        return [self.masks_of[row][self.members[row].index(subject)] for subject in self.asked[prompt]]

    def _mask(self, mask: Path, image: Path, row: int) -> Tensor:
        """A mask at the latent's places."""
        rows, columns = self.arch.latent_shape(*self.sizes[row])[1:]
        return F.interpolate(load_masks([mask], [image], self.sizes[row]), (rows, columns), mode="area")


class Attentive(Denoising):
    """The denoiser's error, with what its cross-attention attended to.

    maps: of the first prediction of a step, whose first rows are the samples; whoever has read them sets them to None.
    """

    pictures: Scenes
    maps: AttentionMaps | None = None

    def output(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.maps is not None:
            return super().output(noisy, t, prompts)
        with attention_maps(self.arch) as self.maps:
            return super().output(noisy, t, prompts)

    def looks(self, maps: AttentionMaps, samples: Samples, side: int, words: Words | None = None) -> list[list[Tensor]]:
        """Where words of each of a sample's subjects are attended to, [h, w]: mean over heads, and the layers nearest to this side.

        words: see `own_words`, which is what None is, and `own_and_class_words`.
        """
        seen = maps.mean(maps.near(side), slice(len(samples.prompts)))  # [n, places, tokens]
        rows, columns = grid_of(seen.shape[1], (samples.latents.shape[2], samples.latents.shape[3]))
        found = []
        for own, prompt in zip(seen, samples.prompts, strict=True):
            tokens = (words or own_words)(self.arch, prompt, self.pictures.asked[prompt]).to(own)
            found.append([one.view(rows, columns) for one in (own @ tokens.T).T])
        return found


OUTSIDE = "weight of predicting outside the masks what the model did before, for the class names; 0: anything goes there"


class AttentiveDenoising(Attentive, PreservedDenoising):
    """The denoiser's error, and what is asked of where it looks: what `attention` says of the samples' cross-attention.

    outside_weight: of how far what is predicted outside the masks has moved from what the model predicted before, there for the class
    names. Without it a subject that is learnt alone, from a picture that shows another, comes with a shadow of that one.
    """

    outside_weight: float = 0.0

    @abstractmethod
    def attention(self, samples: Samples, maps: AttentionMaps) -> tuple[Tensor, dict[str, float]]:
        """A term of the loss, and values to show. maps: of the prediction of these samples, which are its first rows."""

    def learnt(self, samples: Samples, output: Tensor) -> Tensor:
        value = super().learnt(samples, output)
        return value + self.outside_weight * self.moved_outside(samples, output) if self.outside_weight else value

    def moved_outside(self, samples: Samples, output: Tensor) -> Tensor:
        """How far an output is from that of the model before, where no subject of the sample is: the mean square."""
        prompts = [without_token(prompt, self.subjects) for prompt in samples.prompts]
        before = self.said_before(self.noisy(samples), samples.t, prompts)
        outside = 1 - samples.weights / samples.weights.amax((1, 2, 3), keepdim=True)
        return (outside * (output - before).square()).sum() / (outside.sum() * output.shape[1]).clamp(min=1)

    def loss_of(self, samples: Samples, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        self.maps = None
        value, shown = super().loss_of(samples, batch)
        assert self.maps is not None
        looked, more = self.attention(samples, self.maps)
        self.maps = None  # what it holds is large
        return value + looked, {**shown, **more}


Words = Callable[["Architecture", str, Sequence[Subject]], Tensor]


def own_words(arch: Architecture, prompt: str, subjects: Sequence[Subject]) -> Tensor:
    """Which of a prompt's tokens are the new word of each subject [k, L]."""
    return token_mask(arch, [prompt] * len(subjects), [subject.token for subject in subjects])


def own_and_class_words(arch: Architecture, prompt: str, subjects: Sequence[Subject]) -> Tensor:
    """The same, and then which are the class name after it [2 k, L]."""
    whole = token_mask(arch, [prompt] * len(subjects), [named(subject) for subject in subjects])
    own = own_words(arch, prompt, subjects)
    return torch.cat([own, whole & ~own])


def named_in(captions: Sequence[str], members: Sequence[Subject], subjects: Sequence[Subject], image: Path) -> list[tuple[Subject, ...]]:
    """Which of a picture's subjects each of its captions names. One that is not in it, and one that none names, are a UserError.

    subjects: of the task.
    """
    by_token = {subject.token: subject for subject in subjects}
    token = re.compile("|".join(map(re.escape, sorted(by_token, key=len, reverse=True))))  # of <a> and <a>s the longer one
    found = [tuple(by_token[name] for name in dict.fromkeys(token.findall(caption))) for caption in captions]
    for caption, names in zip(captions, found, strict=True):
        if strange := [subject.token for subject in names if subject not in members]:
            raise UserError(f"caption {caption!r} of {image} names {strange[0]}, which is not given this picture; add it to its images")
    if missing := [subject.token for subject in members if not any(subject in names for names in found)]:
        raise UserError(f"no caption of {image} names {missing[0]}, which is given this picture; name it in one, or give it others")
    return found
