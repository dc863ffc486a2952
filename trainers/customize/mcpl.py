"""Multi-concept prompt learning: words for several subjects that are seen together, without a mask of any."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.attention import AttentionMaps, token_mask
from toolkit.concepts import CustomizeTask, Subject, Task
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.prompt_search import TokenRows
from toolkit.world.scenes import ASSETS
from trainers.loop import Batch, Objective
from trainers.scenes import Attentive, Scenes, own_words
from trainers.subjects import Learned, Prompts, Samples

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

TEMPLATES = ("a photo of {}", "a picture of {}", "a rendering of {}", "a depiction of {}")
OF_MASK, OF_CONTRAST = ("mask_threshold", "attention_side"), ("contrast_weight", "contrast_temperature", "adjectives")


@dataclass(frozen=True)
class MCPL(Learned):
    """An Image is Worth Multiple Words: Discovering Object Level Concepts using Multi-Concept Prompt Learning,
    Jin et al., arXiv 2310.12274.

    Equation
        v* = argmin_v E_{z, y, eps, t} || M * (eps - eps_theta(z_t, t, c(y; v))) ||^2  +  contrast_weight L_contrast
        with v the embeddings of all new words, y a caption that names several of them, everything else frozen, and
        M = union over the words w of y of { A_w R_w > mask_threshold max A_w R_w },    R_w = A_w / sum over these words of A_w,
        the attention mask: A_w is where the picture attends to w, mean over heads and the layers with maps of 16 x 16, and R_w what
        it would be if attention were a softmax over the new words alone. Nothing passes a gradient to M.
        L_contrast = mean_i  mean_{j in P(i)}  -log( e^{s_ij / T} / (e^{s_ij / T} + sum_{k in N(i)} e^{s_ik / T}) )
        is InfoNCE over what the text encoder gives at the new words in the different captions of a step, T contrast_temperature: s
        are cosines, P(i) the same word in other captions, N(i) the other words. Adjectives bind: what the encoder gives at a word's
        adjective counts as one more of that word.

    Shapes
        v: [vectors, d] for each word; several are one in L_contrast, by their mean. M: [h', w']. z, eps: [batch, c, h', w'] scaled latents.

    Defaults
        learning_rate 0.005, a batch of 4, one vector, maps of 16 x 16 and mask_threshold 0.3 are the official code's, contrast_weight
        7.5e-4 and contrast_temperature 0.3 those of its example with all three parts. It takes 6100 steps and multiplies the rate by
        the batch size, on a model of 256 pixels; max_train_steps 500 is chosen by us for the embedded model: give thousands for
        photographs.

    Deviations
        This is MCPL-one, a word for each subject. Other words of a caption, which MCPL-all learns too, and relations that differ between
        pictures, MCPL-diverse's, are subjects of their own here: give them the pictures that show them, and captions. Words start from
        their class names; the official code has one such word for the first and draws the others. Masks of the user's take the place
        of M for their subjects. The error is averaged over the mask unless mask_normalization is image, as there.
        What the official code does otherwise, and we take for mistakes: with relations, the contrastive loss has no gradient, because
        its tensor is made anew of numbers. The positive of a word is found by a shift that meets another word unless the number of
        words divides the batch, and the remaining positives are among the negatives. For the mask, probabilities are put through a
        softmax, twice, and are then so even that any place passes the threshold. Maps of the second half of the batch alone are
        kept, and dealt out to all samples; the first sample's mask is added to each.
        So that the parts of a batch, on one process or several, have the loss of the whole, L_contrast is over all captions of the
        step, each once; a word that is in one of them only is its own positive. No random flip: captions may name sides.
    """

    num_vectors: int = option(1, "embedding vectors for each new word")
    attention_mask: bool = option(True, "count the error only where a new word is attended to, for subjects without masks")
    mask_threshold: float = option(0.3, "part of a word's largest attention from which on a place is in the mask")
    attention_side: int = option(16, "side of the attention maps")
    contrast_weight: float = option(7.5e-4, "weight of words being told apart by what the text encoder gives; 0: none")
    contrast_temperature: float = option(0.3, "what similarities are divided by there; smaller ones look at the nearest words alone")
    adjectives: tuple[str, ...] = option((), "what each subject is bound to, in their order, written before its word; may be empty")
    train_batch_size: int = option(4, "pictures that are computed at once")
    learning_rate: float = option(5e-3, "step size")
    max_grad_norm: float = option(math.inf, "largest norm of the gradient; inf: any")

    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2310.12274"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_vectors", "attention_side")
        self.at_least(0, "contrast_weight", "mask_threshold")
        self.more_than(0, "contrast_temperature")
        if self.mask_threshold >= 1:
            raise UserError(f"mask_threshold is {self.mask_threshold}, and no place passes it; give a part below 1 such as 0.3")
        if not self.attention_mask and (idle := self.changed(OF_MASK)):
            raise UserError(f"{', '.join(idle)} given with attention_mask false, where it has no effect; leave it out")
        if not self.contrast_weight and (idle := self.changed(OF_CONTRAST[1:])):
            raise UserError(f"{', '.join(idle)} given with contrast_weight 0, where it has no effect; leave it out")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        subjects = self.subjects(task)
        bound = {one.token: word for one, word in zip(subjects, self.adjectives, strict=False) if word}
        phrases = {one.token: f"{bound[one.token]} {one.token}" if one.token in bound else one.token for one in subjects}
        start = {subject.token: subject.class_name for subject in subjects}
        with TokenRows(model, start, vectors=self.num_vectors, seed=self.seed).unlisted() as rows:
            pictures = Scenes(model.arch, subjects, self, self.templates or TEMPLATES, together, lambda one: f"a {phrases[one.token]}")
            yield Discovering(rows, pictures, self, phrases), rows.edit

    def masked(self, subjects: Sequence[Subject]) -> bool:
        return self.attention_mask or super().masked(subjects)

    def subjects(self, task: Task) -> tuple[Subject, ...]:
        subjects = super().subjects(task)
        if all(subject.masks for subject in subjects) and (idle := self.changed(OF_MASK)):
            raise UserError(f"{', '.join(idle)} has no effect with masks for all subjects; leave it out, or leave masks out")
        if len(subjects) == 1 and (idle := self.changed(OF_CONTRAST)):
            raise UserError(f"{', '.join(idle)} has no effect with one subject, which is told apart from no other; leave it out")
        if self.adjectives and len(self.adjectives) != len(subjects):
            raise UserError(f"{len(self.adjectives)} adjectives for {len(subjects)} subjects; give one for each, empty for none")
        given = [word for word in self.adjectives if word]
        if len(set(given)) < len(given):
            raise UserError(f"the adjectives {', '.join(given)} are not distinct, and each binds one subject; give others")
        return subjects

    @classmethod
    def example_task(cls, model: Model) -> CustomizeTask:
        """Two subjects in the one picture that the package ships: the embedded world's sprites."""
        picture = (ASSETS / "atlas.webp",)
        return CustomizeTask((Subject("<toy>", "picture", picture), Subject("<pal>", "cat", picture)))


class Discovering(Attentive):
    """The masked error, and how well words are told apart in the captions of a step.

    phrases: token -> it and its adjective, as captions have them.
    """

    def __init__(self, rows: TokenRows, pictures: Scenes, method: MCPL, phrases: Mapping[str, str]) -> None:
        super().__init__(rows, pictures, Prompts(pictures.arch, method.cache, grad=True), method)
        self.pictures, self.discovering, self.phrases = pictures, method, phrases
        for prompt, subjects in pictures.asked.items():
            for phrase in (phrases[subject.token] for subject in subjects):
                if phrase.lower() not in prompt.lower():
                    raise UserError(f"caption {prompt!r} does not say {phrase!r}; write the adjective before the word, or leave it out")
        self.sought = method.attention_mask and any(None in masks for masks in pictures.masks_of)
        self.own, self.stands = cache(own_words), cache(self._stands)  # found once for each prompt

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        value, shown = super().loss(batch)
        if not self.discovering.contrast_weight or len(self.phrases) == 1:
            return value, shown
        alike = self.alike(batch)
        return value + self.discovering.contrast_weight * alike, {**shown, "contrast": alike.item()}

    def error(self, samples: Samples, output: Tensor) -> Tensor:
        maps, self.maps = self.maps, None
        return super().error(replace(samples, weights=self.masked(samples, maps)) if maps and self.sought else samples, output)

    @torch.no_grad()
    def masked(self, samples: Samples, maps: AttentionMaps) -> Tensor:
        """What the error counts at each place [n, 1, h', w'], with the attention mask where the user gave none."""
        weights = []
        looks = self.looks(maps, samples, self.discovering.attention_side, self.own)
        for row, prompt, weight, seen in zip(samples.rows, samples.prompts, samples.weights, looks, strict=True):
            given = self.pictures.each_mask(row, prompt)
            if None in given:
                looked = F.interpolate(torch.stack(seen)[None].float(), weight.shape[1:], mode="bilinear")[0]
                found = attended(looked, self.discovering.mask_threshold)
                each = [place if mask is None else mask[0, 0].to(place) for place, mask in zip(found, given, strict=True)]
                weight = torch.stack(each).amax(0)[None]
                weight = weight / weight.mean() if self.method.mask_normalization == "mask" else weight
            weights.append(weight)
        return torch.stack(weights).to(samples.weights)

    def alike(self, batch: Batch) -> Tensor:
        """The contrastive loss over the different captions of the whole step."""
        prompts = list(dict.fromkeys(self.pictures.captions_of_step(self.method.name(), self.method, batch)))
        found = [
            (word, hidden[where].mean(0))
            for prompt, hidden in zip(prompts, self.text(prompts).hidden, strict=True)
            for word, where in self.stands(prompt)
        ]
        words = torch.tensor([word for word, _ in found], device=self.arch.device)
        return contrast(torch.stack([row for _, row in found]), words, self.discovering.contrast_temperature)

    def _stands(self, prompt: str) -> list[tuple[int, Tensor]]:
        """For each new word in a prompt its number, and where it stands [L]; the same for its adjective."""
        numbers, subjects = list(self.phrases), self.pictures.asked[prompt]
        found = []
        for subject, own in zip(subjects, self.own(self.arch, prompt, subjects), strict=True):
            phrase, number = self.phrases[subject.token], numbers.index(subject.token)
            found.append((number, own))
            if phrase != subject.token:
                found.append((number, token_mask(self.arch, [prompt], [phrase])[0] & ~own))
        return found


def together(count: int) -> list[tuple[int, ...]]:
    """All subjects of a picture."""
    return [tuple(range(count))]


def attended(looked: Tensor, threshold: float) -> Tensor:
    """Where each of some words is attended to, and more so than the others: [k, h, w] of 0 and 1, from its attention [k, h, w]."""
    share = looked / looked.sum(0).clamp(min=torch.finfo(looked.dtype).tiny)
    most = (looked * share).amax((1, 2), keepdim=True)
    return (looked * share > threshold * most).to(looked)


def contrast(embeddings: Tensor, words: Tensor, temperature: float) -> Tensor:
    """InfoNCE: embeddings [m, d] of one word, by its number in `words` [m], are to be nearer to one another than to those of others.

    A word with a single embedding is its own positive.
    """
    rows = embeddings.float()
    near = F.cosine_similarity(rows[:, None], rows[None], dim=-1) / temperature
    same = words[:, None] == words
    itself = torch.eye(len(words), dtype=torch.bool, device=words.device)
    positive = same & ~(itself & (same.sum(1) > 1)[:, None])
    others = near.masked_fill(same, torch.finfo(near.dtype).min).logsumexp(1, keepdim=True)
    losses = F.softplus(others - near)  # -log(e^near / (e^near + e^others))
    return ((losses * positive).sum(1) / positive.sum(1)).mean()
