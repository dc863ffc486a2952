"""ConceptExpress: the concepts of one picture, found without being told how many, each with a word of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from toolkit.attention import AttentionMaps
from toolkit.concepts import CustomizeTask, Subject, Task, expect
from toolkit.edits.token import TokenEdit
from toolkit.errors import PalimpsestError, UserError
from toolkit.images import save_png
from toolkit.method import option
from toolkit.prompt_search import LiveTokens, initial_rows
from toolkit.runs import seeded
from toolkit.world.scenes import ASSETS
from trainers.customize.attencraft import alone_or_all
from trainers.found_concepts import Foreground, Found, attended, find
from trainers.loop import Batch, Objective
from trainers.scenes import Attentive, Scenes
from trainers.subjects import Learned, Photos, Prompts, Samples
from trainers.transport import transport

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

TEMPLATE = "a photo of {}"
OF_SPLIT = ("num_split_tokens", "contrast_weight", "temperature")


@dataclass(frozen=True)
class ConceptExpress(Learned):
    """ConceptExpress: Harnessing Diffusion Models for Single-image Unsupervised Concept Extraction, Hao et al., arXiv 2407.07077.

    Equation
        L = || M_S * (eps - e(z_t, t, c(y_S))) ||^2  +  attention_weight sum_{i in S} EMD(F_i, A_i)  +  contrast_weight L_contrast
        with S one concept of the picture or all of them, y_S "a photo of <asset0> and <asset1>", M_S the union of their masks, F_i what the
        places of concept i attend to on average, by self-attention, A_i where the picture attends to its word, and EMD the earth mover's
        distance (`trainers.transport`). Only embeddings are trained, and at first several for each concept, each of them alone:
        L_contrast = mean_a -1/|P(a)| sum_{b in P(a)} log( e^{v_a v_b / T} / sum_{c != a} e^{v_a v_c / T} )
        over the unit vectors v of them all, P(a) the others of a's concept (SupCon). Then the concept's word is their mean.
        Masks: the picture's places, each with what it attends to when the prompt is empty, are clustered into num_regions; of those
        in the foreground, neighbours become one while what they attend to differs by less than merge_limit (Jensen-Shannon divergence).

    Shapes
        M, F: [h, w] at the size of the finest self-attention. A: at that of the maps near attention_side. v: [num_split_tokens, d] for each
        concept. z, eps: [batch, c, h', w'] scaled latents.

    Defaults
        5 split tokens for 100 of 500 steps, learning_rate 5e-4, attention_weight 1e-5, contrast_weight 1e-3 and temperature 0.07 are the
        official code's. The others that say where concepts are were chosen by us on the embedded model, on 64 rendered scenes.

    Deviations
        The task is one subject with one picture, whose token is a stem: <asset> becomes <asset0>, <asset1>, ..., the largest first, and the
        edit's triggers name what was found. A class name is where all words start from; without one, as in the official code, they
        start from rows of the vocabulary, here drawn at random and there the last ones.
        The official code clusters by FINCH, whose reference may not be used commercially, on the symmetric Kullback-Leibler divergence.
        Here regions merge with their neighbours alone, from the first step on, that pair first which loses least of what places tell of
        where they attend to; it looks for a partition of about ten clusters. It reads attention at the clean latent, which is
        noise_level 0 here; the mean over draws of noise makes better masks on the embedded model. Its foreground is what attends to the
        end of the text more than the mean does (foreground=end_of_text); on the embedded model background is told better by how far
        its places attend. Parts smaller than least_area are no concepts.
        It updates once for each prompt, 5 n times in a step and later n + 1, where here a step is one update on train_batch_size
        samples, and max_train_steps and split_steps are of each concept. It replaces the split embeddings by their mean, of which one
        goes on; here all go on and the word is their mean, which is the same word and needs no state. The error is averaged
        over the mask unless mask_normalization is image. The smoothing of the transport is 0.3 places, for which the iterations
        converge; there it is 1e-3, for which 200 are far too few. No random flip, as everywhere here.
    """

    num_concepts: int | None = option(None, "how many there are at most, the largest; none: as many as are found")
    num_regions: int = option(40, "into how many regions the picture is cut before background is left out")
    foreground: Foreground = option("spread", "regions that attend less far, or more to the end of the empty text")
    merge_limit: float = option(0.25, "how differently neighbours may attend and still be one concept, up to ln 2")
    least_area: float = option(0.02, "smallest part of the picture that is a concept")
    noise_level: float = option(0.3, "part of all timesteps at which attention is read for it; 0: the clean picture")
    noise_draws: int = option(4, "noises over which that is averaged")
    num_split_tokens: int = option(5, "embeddings that each concept is learnt with at first")
    split_steps: int = option(100, "of the steps, from the first, those with these")
    attention_weight: float = option(1e-5, "weight of words being attended to where their concepts attend")
    attention_side: int = option(16, "side of these maps")
    contrast_weight: float = option(1e-3, "weight of a concept's embeddings being alike, and unlike the others'")
    temperature: float = option(0.07, "what similarities are divided by there")
    train_batch_size: int = option(4, "samples that are computed at once")
    learning_rate: float = option(5e-4, "step size")
    max_grad_norm: float = option(math.inf, "largest norm of the gradient; inf: any")

    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2407.07077"
    finds: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_concepts", "num_regions", "noise_draws", "attention_side")
        self.at_least(2, "num_split_tokens")
        self.at_least(0, "merge_limit", "least_area", "split_steps", "attention_weight", "contrast_weight")
        self.more_than(0, "temperature")
        if not 0 <= self.noise_level < 1:
            raise UserError(f"noise_level is {self.noise_level}, needs 0, or a part below 1 such as 0.3; give such a number")
        if not self.noise_level and self.changed(["noise_draws"]):
            raise UserError(f"noise_draws {self.noise_draws} has no effect at noise_level 0; leave it out")
        if not self.split_steps and (idle := self.changed(OF_SPLIT)):
            raise UserError(f"{', '.join(idle)} given with split_steps 0, where it has no effect; leave it out")

    def find(self, model: Model, image: Path) -> Found:
        """What is in a picture, without training: masks [k, h, w] at the places of the finest self-attention, k may be 0."""
        latent, _ = Photos(model.arch, [image], [("",)], [None], self).encoded(0)
        seen = attended(model.arch, latent, self.noise_level, self.noise_draws if self.noise_level else 1, self.seed)
        return find(
            seen,
            regions=self.num_regions,
            foreground=self.foreground,
            limit=self.merge_limit,
            least=self.least_area,
            most=self.num_concepts,
        )

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        subject = one_picture(task)
        found = self.find(model, subject.images[0])
        if not len(found.masks):
            raise PalimpsestError(f"nothing is found in {subject.images[0]}; lower least_area (now {self.least_area}), or set foreground")
        words = tuple(numbered(subject.token, i) for i in range(len(found.masks)))
        rows = SplitRows(model, words, self.num_split_tokens, subject.class_name or None, self.seed)
        with rows.unlisted():
            yield Expressing(model, rows, self, subject, found), lambda info: rows.edit(replace(info, triggers=words))

    @classmethod
    def example_task(cls, model: Model) -> CustomizeTask:
        """The one picture that the package ships: the embedded world's sprites."""
        return CustomizeTask((Subject("<asset>", "", (ASSETS / "atlas.webp",)),))


class SplitRows(nn.Module):
    """New words with several embeddings each, in the model within `unlisted`: one word for each of them, and one for their mean."""

    def __init__(self, model: Model, words: Sequence[str], count: int, start: str | None, seed: int) -> None:
        super().__init__()
        self._model, self.words = model, words
        self.split = [tuple(f"{numbered(word, f'/{i}')}" for i in range(count)) for word in words]
        self.rows = nn.ModuleDict()
        for part, embedding in model.arch.token_embeddings().items():
            draw, tokenizer = seeded("concepts' words", seed, part), model.arch.tokenizers()[part]
            if start is None:
                drawn = torch.randint(len(tokenizer), (len(words) * count,), generator=draw)
                first = embedding.weight.detach().float()[drawn.to(embedding.weight.device)]
            else:
                each = [initial_rows(embedding, tokenizer, start, count, draw) for _ in words]
                first = torch.cat(each)
            self.rows[part] = _WithMeans(first.view(len(words), count, -1))
        names = [*words, *(name for split in self.split for name in split)]
        tokens = {name: {part: rows()[i : i + 1].detach() for part, rows in self.rows.items()} for i, name in enumerate(names)}
        self._edit = LiveTokens(TokenEdit.from_rows(tokens).info, tokens, self.rows)

    def embeddings(self) -> Tensor:
        """All of them as unit vectors [components, words, count, d], those of narrower encoders filled up with zeros."""
        parts = [F.normalize(rows.each.float(), dim=-1) for rows in self._parts()]
        widest = max(rows.shape[-1] for rows in parts)
        return torch.stack([F.pad(rows, (0, widest - rows.shape[-1])) for rows in parts])

    def edit(self, info: EditInfo) -> TokenEdit:
        """The words, each with the mean of its embeddings."""
        parts = dict(zip(self.rows, self._parts(), strict=True))
        means = {word: {part: rows.each[i].mean(0, keepdim=True) for part, rows in parts.items()} for i, word in enumerate(self.words)}
        return TokenEdit.from_rows(means, info)

    def _parts(self) -> list[_WithMeans]:
        return [rows for rows in self.rows.values() if isinstance(rows, _WithMeans)]

    @contextmanager
    def unlisted(self) -> Iterator[None]:
        """See `TokenRows.unlisted`."""
        with self._edit.unlisted(self._model):
            yield


class _WithMeans(nn.Module):
    """Rows [words, count, d], which called are first each word's mean, then all of them."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.each = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        return torch.cat([self.each.mean(1), self.each.flatten(0, 1)])


class Expressing(Attentive):
    """The masked error, how far words' attention is from their concepts', and how well the concepts' embeddings are told apart."""

    module: SplitRows

    def __init__(self, model: Model, rows: SplitRows, method: ConceptExpress, subject: Subject, found: Found) -> None:
        self.expressing, self.found, self.turns = method, found, len(found.masks)
        template = method.templates or TEMPLATE

        def pictures(names: Sequence[Sequence[str]], choices: Callable[[int], list[tuple[int, ...]]]) -> Scenes:
            """Those in which the concepts have these names; all names of one have its mask."""
            scenes = Scenes(model.arch, [replace(subject, token=name) for own in names for name in own], method, template, choices)
            latent = scenes.encoded(0)[0]
            masks = F.interpolate(found.masks[:, None], latent.shape[2:], mode="bilinear").to(latent)
            scenes.masks_of[0] = [mask[None] for mask, own in zip(masks, names, strict=True) for _ in own]
            return scenes

        self.split = pictures(rows.split, lambda count: [(i,) for i in range(count)])
        self.whole = pictures([(word,) for word in rows.words], alone_or_all)
        self.features = {name: one for own, one in zip(rows.split, found.features, strict=True) for name in own}
        self.features |= dict(zip(rows.words, found.features, strict=True))
        super().__init__(rows, self.whole, Prompts(model.arch, method.cache, grad=True), method)

    def is_split(self, batch: Batch) -> bool:
        """Whether a step is one of the first, in which each embedding is a word."""
        return batch.step < self.expressing.split_steps * self.turns

    def samples(self, batch: Batch) -> Samples:
        self.pictures = self.split if self.is_split(batch) else self.whole
        return super().samples(batch)

    def loss_of(self, samples: Samples, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        self.maps = None
        value, shown = super().loss_of(samples, batch)
        assert self.maps is not None
        moved, self.maps = self.moved(samples, self.maps), None
        value, shown = value + self.expressing.attention_weight * moved, {**shown, "moved": moved.item()}
        if self.is_split(batch):
            apart = torch.stack([supervised_contrast(rows, self.expressing.temperature) for rows in self.module.embeddings()]).mean()
            value, shown = value + self.expressing.contrast_weight * apart, {**shown, "contrast": apart.item()}
        return value, shown

    def moved(self, samples: Samples, maps: AttentionMaps) -> Tensor:
        """How far the attention to the words of a sample is from what their concepts attend to: their sum, mean over samples."""
        looks = self.looks(maps, samples, self.expressing.attention_side)
        seen = torch.stack([one for own in looks for one in own])
        names = [subject.token for prompt in samples.prompts for subject in self.pictures.asked[prompt]]
        features = torch.stack([self.features[name] for name in names]).to(seen)
        grid = (seen.shape[1], seen.shape[2])
        wanted = F.interpolate(features[:, None], grid, mode="area")[:, 0]
        return transport(wanted.flatten(1), seen.flatten(1), grid).sum() / len(samples.prompts)

    def show(self, folder: Path) -> None:
        (folder / "concepts").mkdir(parents=True, exist_ok=True)
        high, wide = self.whole.sizes[0]
        for number, mask in enumerate(self.found.masks):
            picture = Image.fromarray((255 * mask.numpy()).astype(np.uint8))
            save_png(picture.resize((wide, high), Image.Resampling.NEAREST), folder / "concepts" / f"{number}.png")


def one_picture(task: Task) -> Subject:
    """The one subject of a task, which has one picture and nothing else."""
    subject, *others = expect(CustomizeTask, task).subjects
    if others or len(subject.images) > 1:
        given = f"{1 + len(others)} subjects with {sum(len(one.images) for one in (subject, *others))} images"
        raise UserError(f"{given} given, and this method finds the concepts of one picture; give one subject with one image")
    for name, given in (("masks", subject.masks), ("captions", subject.captions)):
        if given:
            raise UserError(f"{name} given for {subject.token}, and this method makes its own; leave them out")
    return subject


def numbered(token: str, number: int | str) -> str:
    """A word made of a stem: <asset> and 0 give <asset0>."""
    return f"{token[:-1]}{number}>" if token.endswith(">") else f"{token}{number}"


def supervised_contrast(rows: Tensor, temperature: float) -> Tensor:
    """SupCon (Khosla et al., arXiv 2004.11362) of unit vectors [concepts, count, d], those of one concept alike."""
    concepts, count = rows.shape[:2]
    every = rows.flatten(0, 1)
    itself = torch.eye(len(every), dtype=torch.bool, device=rows.device)
    of = torch.arange(concepts, device=rows.device).repeat_interleave(count)
    like = (every @ every.T / temperature).masked_fill(itself, -torch.inf)
    log = like - like.logsumexp(1, keepdim=True)
    return -log[(of[:, None] == of) & ~itself].mean()
