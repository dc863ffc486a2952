"""Break-A-Scene: several subjects out of one picture, each with a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from math import lcm
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.attention import AttentionMaps
from toolkit.concepts import CustomizeTask, Subject, Task
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.prompt_search import TokenRows
from toolkit.world.scenes import ASSETS
from trainers.loop import Batch, LoopConfig, Objective
from trainers.parameters import PARAMETERS, parameter_names
from trainers.preservation import PRIOR, Preserving, Prior
from trainers.scenes import OUTSIDE, AttentiveDenoising, Scenes
from trainers.subjects import Prompts, Samples
from trainers.weights import FullWeights, LoraWeights, Trainable, WordsAndWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

TEMPLATE = "a photo of {}"


@dataclass(frozen=True)
class BreakAScene(Preserving):
    """Break-A-Scene: Extracting Multiple Concepts from a Single Image, Avrahami et al., arXiv 2305.16311.

    Equation
        L = E_{S, eps, t} || M_S * (eps - e(z_t, t, c(y_S))) ||^2
          + attention_weight E_{S, z_t, t} 1/|S| sum_{i in S} || M_i - A_i / max A_i ||^2  +  prior_weight L_prior
        with S some of the subjects of a picture, drawn anew for every sample: first how many, then which; y_S "a photo of <a> and
        <b>"; M_S the union of their masks; A_i the probabilities with which the picture attends to the word of i, mean over heads
        and the layers with maps of 16 x 16; and L_prior DreamBooth's. First the embeddings v of the words are trained, then these and the
        weights with a smaller step size. On a model that predicts velocity the same is done in velocities.

    Shapes
        z, eps: [batch, c, h', w'] scaled latents. M: [h', w'], for A at its own size. v: [1, d] for each word.

    Defaults
        400 steps at 5e-4 for the words and 400 at 2e-6 for all weights and the text encoders, attention_weight 0.01,
        prior_weight 1 on pictures of "a photo at the beach" are the official code's.

    Deviations
        The error is averaged over the mask, not over the whole picture, unless mask_normalization is image. Layers are those whose maps
        are nearest to attention_side. Words start from their class names; the official code starts from its placeholder's neighbours.
        Several pictures may be given, and subjects that are in some of them only. outside_weight, rank
        and num_vectors are ours.
    """

    parameters: Literal["none", "x", "x_strict", "u", "all"] = option("all", f"in the second part, {PARAMETERS}, or none")
    train_text_encoder: bool = option(True, "train the text encoders too in the second part")
    rank: int = option(0, "train low-rank changes of this rank instead of the weights themselves; 0: these")
    num_vectors: int = option(1, "embedding vectors of each word")
    words_steps: int = option(400, "of the steps, from the first, those in which the words alone are trained")
    tuning_learning_rate: float = option(2e-6, "step size of words and weights after these")
    attention_weight: float = option(0.01, "weight of words being attended to where their subjects are")
    attention_side: int = option(16, "side of the attention maps that are compared with the masks")
    outside_weight: float = option(0.0, OUTSIDE)
    prior: Prior = option("images", PRIOR)
    class_prompts: tuple[str, ...] = option(("a photo at the beach",), "what the model draws for it, in turn; empty: a photo of each class")
    max_train_steps: int = option(800, "optimizer steps")
    learning_rate: float = option(5e-4, "step size of the words at first")

    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2305.16311"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "words_steps", "attention_weight", "outside_weight")
        self.at_least(0, "rank")
        self.at_least(1, "attention_side", "num_vectors")
        idle = self.parameters == "none" and not self.train_text_encoder
        if idle and self.words_steps < self.max_train_steps:
            raise UserError("parameters is none and train_text_encoder false, so words alone are trained; raise words_steps to that")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        subjects = self.subjects(task)
        for subject in subjects:
            if not subject.masks:
                raise UserError(f"no masks given for {subject.token}, and this method learns from where it is; give one for each image")
        names = parameter_names(model.arch, self.parameters) if self.parameters != "none" else []
        names += model.arch.encoder_parameters() if self.train_text_encoder else []
        start = {subject.token: subject.class_name for subject in subjects}
        with TokenRows(model, start, vectors=self.num_vectors, seed=self.seed).unlisted() as rows:
            pictures = Scenes(model.arch, subjects, self, self.templates or TEMPLATE, how_many_then_which)
            weights = WordsAndWeights(rows, self.weights(model, names if self.words_steps < self.max_train_steps else []))
            with weights:
                yield Breaking(model, weights, self, subjects, pictures), weights.edit

    def weights(self, model: Model, names: Sequence[str]) -> Trainable:
        """What is trained beside the words: these parameters, or low-rank changes of their layers."""
        if not self.rank:
            return FullWeights(model, names)
        layers = {**model.arch.denoiser_layers(), **model.arch.encoder_lora_targets()}
        return LoraWeights({site: layers[site] for site in layers if f"{site}.weight" in set(names)}, self.rank, seed=self.seed)

    @classmethod
    def example_task(cls, model: Model) -> CustomizeTask:
        """Two subjects in the one picture that the package ships, the embedded world's sprites, each everywhere."""
        picture = (ASSETS / "atlas.webp",)
        return CustomizeTask((Subject("<toy>", "dog", picture, picture), Subject("<pal>", "cat", picture, picture)))


class Breaking(AttentiveDenoising):
    """The masked error, and how far the words' attention is from the masks."""

    module: WordsAndWeights

    def __init__(self, model: Model, weights: WordsAndWeights, method: BreakAScene, subjects: Sequence[Subject], pictures: Scenes) -> None:
        super().__init__(model, weights, Prompts(model.arch, method.cache, grad=True), method, subjects, pictures)
        self.breaking, self.pictures, self.outside_weight = method, pictures, method.outside_weight

    def optimizer(self, parameters: list[nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
        made = super().optimizer(list(self.module.rows.parameters()), config)
        if others := list(self.module.weights.parameters()):
            made.add_param_group({"params": others})
        return made

    def step_sizes(self, step: int) -> Sequence[float]:
        method = self.breaking
        return () if step < method.words_steps else [method.tuning_learning_rate / method.learning_rate] * 2

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        self.module.weights.requires_grad_(batch.step >= self.breaking.words_steps)
        return super().loss(batch)

    def attention(self, samples: Samples, maps: AttentionMaps) -> tuple[Tensor, dict[str, float]]:
        looks, errors = self.looks(maps, samples, self.breaking.attention_side), []
        for row, prompt, own in zip(samples.rows, samples.prompts, looks, strict=True):
            masks = self.pictures.masks_in(row, prompt)
            each = [F.mse_loss(seen / seen.max(), _at(mask, seen)) for seen, mask in zip(own, masks, strict=True)]
            errors.append(torch.stack(each).mean())
        apart = torch.stack(errors).mean()
        return self.breaking.attention_weight * apart, {"attention": apart.item()}


def how_many_then_which(count: int) -> list[tuple[int, ...]]:
    """Some of so many, each number of them as often as the others, and of one number each choice as often."""
    by_size = [list(combinations(range(count), size)) for size in range(1, count + 1)]
    most = lcm(*map(len, by_size))
    return [some for found in by_size for some in found * (most // len(found))]


def _at(mask: Tensor, like: Tensor) -> Tensor:
    """A mask [1, 1, h', w'] at the size of a map [h, w]."""
    return F.adaptive_avg_pool2d(mask.to(like), (like.shape[0], like.shape[1]))[0, 0]
