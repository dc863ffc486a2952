"""ClassDiffusion: Custom Diffusion whose word stays what its class is, so that it can still be composed with other things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor

from toolkit.concepts import Subject, named
from toolkit.method import option
from trainers.customize.custom_diffusion import CustomDiffusion
from trainers.loop import Batch
from trainers.preservation import PRIOR, PreservedDenoising, Prior
from trainers.subjects import Pool, Prompts
from trainers.weights import WordsAndWeights

if TYPE_CHECKING:
    from toolkit.model import Model

PHRASE = "a photo of a {}"


@dataclass(frozen=True)
class ClassDiffusion(CustomDiffusion):
    """ClassDiffusion: More Aligned Personalization Tuning with Explicit Class Guidance, Huang et al., arXiv 2405.17532.

    Equation
        L = L_custom + spl_weight / n  sum_i  1 - cos( c("a photo of a <toy_i> dog")[EOT], c("a photo of a dog")[EOT] )
        with L_custom that of Custom Diffusion (see `custom_diffusion`), c the text encoder's output at the end of text, and the sum
        over the n subjects: the semantic preservation loss.

    Shapes
        c(y)[EOT]: [d], the width of what the denoiser reads.

    Defaults
        spl_weight 1, no pictures of the class, and the rest as in the official code, which is Custom Diffusion's: 500 steps of 2
        pictures at 1e-5 times 2.

    Deviations
        The official code has either the class's pictures or this loss; here `prior` may be given beside it. Only the new words
        change what the text encoder gives, so that the loss acts on them alone; the paper's figures read as if the weights took part.
        What `custom_diffusion` says of its own deviations holds here too.
    """

    spl_weight: float = option(1.0, "weight of the word's phrase staying near its class's")
    prior: Prior = option("none", PRIOR)
    learning_rate: float = option(2e-5, "step size")

    paper: ClassVar = "arXiv:2405.17532"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "spl_weight")

    def learning(self, model: Model, weights: WordsAndWeights, subjects: Sequence[Subject]) -> SemanticPreservation:
        return SemanticPreservation(model, weights, self, subjects, self.pictures(model, subjects))


class SemanticPreservation(PreservedDenoising):
    """Custom Diffusion's loss, and how far the phrases with the words are from those of their classes."""

    def __init__(self, model: Model, weights: WordsAndWeights, method: ClassDiffusion, subjects: Sequence[Subject], pictures: Pool) -> None:
        super().__init__(model, weights, Prompts(model.arch, method.cache, grad=True), method, subjects, pictures)
        self.spl_weight = method.spl_weight

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        value, shown = super().loss(batch)
        away = self.away()
        return value + self.spl_weight * away, {**shown, "semantic": away.item()}

    def away(self) -> Tensor:
        """1 - cos, mean over the subjects."""
        ours = self.arch.encode([PHRASE.format(named(subject)) for subject in self.subjects], grad=True).ends()
        classes = self.arch.encode([PHRASE.format(subject.class_name) for subject in self.subjects]).ends()
        return (1 - F.cosine_similarity(ours, classes, dim=-1)).mean()
