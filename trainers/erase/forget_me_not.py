"""Forget-Me-Not: on pictures of a concept, the image learns to look away from the concept's words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.arch.text import Text
from toolkit.attention import attention_maps, token_mask
from toolkit.concepts import Concept, EraseTask, Task
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.prompt_search import TokenRows, search
from trainers.erase.options import TrainedOnPictures
from trainers.erase.pictures import Pictures, prompts_of
from trainers.erase.prompts import erase_task
from trainers.loop import Batch, Objective
from trainers.parameters import PARAMETERS, Parameters, parameter_names
from trainers.weights import FullWeights

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

INVERSION = ("inversion_vectors", "inversion_learning_rate")  # options of the search for a word
Tokens = Literal["concept", "end", "padding"]


@dataclass(frozen=True)
class ForgetMeNot(TrainedOnPictures):
    """Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models, Zhang et al., arXiv 2303.17591.

    Equation
        min_theta  E_{z, y, eps, t} || A_theta(z_t, y, t)[N] ||,    z_t = alpha_t z + sigma_t eps,
        with z the latent of a picture of the concept, y a template around a word of the concept, t uniform, A the probabilities of
        all heads of all cross-attention layers, N the places of the concept's tokens in y, and || || the root of the sum of squares.
        What the denoiser predicts is not compared with anything.

    Shapes
        A: [batch, heads, places of the image, tokens] for each layer. z, eps: [batch, c, h', w'] scaled latents.

    Defaults
        35 steps of AdamW at 2e-6 with one picture each, and the end token among N, as in the official code's configuration for
        Stable Diffusion 2.1, which also brings ten pictures. Parameters x (all of the cross-attention) is its `only_optimize_ca`, all
        is its configuration's choice. Its authors advise to tune steps and their size for each concept. With `inversion_steps` a new
        word is first found by textual inversion on the pictures, starting from the concept's name, and stands for the concept's words
        while training: the official configuration does so, with 500 steps at 1e-3 and 4 vectors. The word is no part of the edit.

    Deviations
        Without `images` the model draws the pictures itself, as it is before training: the official code reads real ones, and
        `no_real_image` noises zeros in their place. Latents are not decoded and encoded again on the way. The posterior's mean is
        encoded, of the centre square, where the official code samples it, and cuts at random. Templates are the task's or the concept's
        own, where it has one ("a photo of"), and every synonym is trained beside the name. The norm is each sample's own and the loss
        their mean, so that parts of a batch can be computed apart; the official code takes one norm of the whole batch, in which it
        pairs the concept's places with the wrong samples, as it repeats them in another order than heads are laid out (with its batch
        of one it does not matter). Its end token is every token with that number, which on Stable Diffusion 1 are all that pad the
        prompt and on 2 is the first alone; here `tokens` says which. The inverted word starts from the name's tokens in turn with a
        little noise, not half of it from random rows, by plain Adam, and its rows are not drawn towards the length of others. Pictures
        come in turn, in an order that is drawn anew each round.
    """

    parameters: Parameters = option("x", PARAMETERS)
    tokens: Tokens = option("end", "what is looked away from: concept (its words), end (the end token too), or padding (that too)")
    inversion_steps: int = option(0, "steps of finding a new word that stands for the concept's own words in training; 0: none is")
    inversion_vectors: int = option(4, "embedding vectors of that word")
    inversion_learning_rate: float = option(1e-3, "step size of finding it")
    max_train_steps: int = option(35, "optimizer steps")
    learning_rate: float = option(2e-6, "step size")

    paper: ClassVar = "arXiv:2303.17591"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inversion_steps < 0 or self.inversion_vectors < 1:
            given = f"inversion_steps is {self.inversion_steps}, inversion_vectors {self.inversion_vectors}"
            raise UserError(f"{given}; give at least 0 and at least 1")
        given = self.changed(INVERSION)
        if given and not self.inversion_steps:
            raise UserError(f"{', '.join(given)} given without inversion_steps, so that no word is looked for; give it, or leave them out")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        task = erase_task(task, None, anchors=False)
        if self.images is not None and self.inversion_steps and task.concepts[0].synonyms:
            why = "images show the concept and a new word names it, so its synonyms have no effect; leave them out"
            warnings.warn(why, stacklevel=2)
        resteering = Resteering(model, self, task)
        with resteering.weights:
            yield resteering, resteering.weights.edit

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with a synonym, and another."""
        return EraseTask((Concept("cat", ("kitty",)), Concept("bird")))


class Resteering(Objective):
    """How much the pictures of the concepts attend to the concepts' tokens."""

    def __init__(self, model: Model, method: ForgetMeNot, task: EraseTask) -> None:
        self.arch, self.method = model.arch, method
        self.pictures = Pictures.of(model, method, task)
        if method.inversion_steps:
            start = {f"<forgotten-{i}>": concept.name for i, concept in enumerate(task.concepts)}
            renamed = [replace(concept, name=word, synonyms=()) for concept, word in zip(task.concepts, start, strict=True)]
            task = replace(task, concepts=tuple(renamed))
            self.pictures = replace(self.pictures, prompts=prompts_of(task))
            with TokenRows(model, start, vectors=method.inversion_vectors, seed=method.seed) as rows:
                invert(rows, self.pictures, method)
                self.asked = Asked(model.arch, task, method.tokens)
        else:
            self.asked = Asked(model.arch, task, method.tokens)
        self.module = self.weights = FullWeights(model, parameter_names(model.arch, method.parameters))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        seen = self.pictures.noised("forget_me_not", self.method.seed, batch, self.method.train_batch_size)
        text, tokens = self.asked.of(seen.prompts)
        with attention_maps(self.arch) as maps:
            self.arch.predict(seen.latents, seen.t, text)
        squares = [(maps.probabilities(site).float() * tokens[:, None, None]).square().sum((1, 2, 3)) for site in maps.sites]
        return torch.stack(squares).sum(0).sqrt().mean(), {}


class Asked:
    """A task's prompts, encoded, with the tokens of each that are looked away from.

    tokens: [n, L], True for those.
    """

    def __init__(self, arch: Architecture, task: EraseTask, tokens: Tokens) -> None:
        templates = {concept: task.templates or concept.templates for concept in task.concepts}
        words = {template.format(word): word for concept in task.concepts for template in templates[concept] for word in concept.words}
        self.place = {prompt: place for place, prompt in enumerate(words)}
        self.text = arch.encode(list(words))
        self.tokens = token_mask(arch, list(words), list(words.values()))
        places, last = torch.arange(self.tokens.shape[1], device=self.tokens.device), self.text.length[:, None] - 1
        if tokens != "concept":
            self.tokens |= places == last if tokens == "end" else places >= last

    def of(self, prompts: Sequence[str]) -> tuple[Text, Tensor]:
        """Of some of the prompts."""
        rows = torch.tensor([self.place[prompt] for prompt in prompts], device=self.tokens.device)
        return self.text[rows], self.tokens[rows]


def invert(rows: TokenRows, pictures: Pictures, method: ForgetMeNot) -> list[float]:
    """Textual inversion: words with which the pictures are denoised best. Returns the losses."""

    def loss(step: int) -> Tensor:
        seen = pictures.noised("inversion", method.seed, Batch(step), method.train_batch_size)
        return F.mse_loss(pictures.arch.predict(seen.latents, seen.t, rows(seen.prompts)), seen.target)

    return search(rows, loss, steps=method.inversion_steps, lr=method.inversion_learning_rate, seed=method.seed)
