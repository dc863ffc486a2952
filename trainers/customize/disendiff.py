"""DisenDiff: several subjects out of one picture without masks, by where words and class names are attended to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.attention import AttentionMaps
from toolkit.concepts import Subject, named
from toolkit.errors import UserError
from toolkit.method import option
from trainers.attention_masks import minmax
from trainers.keys_and_values import WithKeysAndValues
from trainers.scenes import AttentiveDenoising, Scenes, own_and_class_words
from trainers.subjects import Prompts, Samples
from trainers.weights import WordsAndWeights

if TYPE_CHECKING:
    from toolkit.model import Model

TEMPLATE = "{}"
SMOOTH = 1.0  # added to both sides of an overlap's quotient
BLUR = 0.5  # deviation of the Gaussian, in places of a map


@dataclass(frozen=True)
class DisenDiff(WithKeysAndValues):
    """Attention Calibration for Disentangled Text-to-Image Personalization, Zhang et al., arXiv 2403.18551.

    Equation
        L = L_custom + attention_weight / n  ( L_bind + L_separate )
        L_bind = sum_i 1 - iou(sg[C_i], W_i),    L_separate = mean over pairs of iou(C_i, C_j),
        iou(a, b) = (sum ab + 1) / (sum (a + b) - sum ab + 1)
        with L_custom that of Custom Diffusion on the prompt "<a> dog and <b> cat", which names all n subjects of a picture, W_i where
        the picture attends to the new word of i, C_i where to its class name, squared, which suppresses what is attended to little, and
        sg[] without gradient. The maps are means over heads and the layers with maps of 16 x 16, from 0 to 1, and blurred a little.

    Shapes
        W, C: [h, w] for each subject of each picture. z, eps: [batch, c, h', w'] scaled latents.

    Defaults
        The official code's: attention_weight 0.01, 250 steps of 8 pictures, in 4 parts of 2, at 8e-5, pictures of the class beside
        them; a Gaussian of 3 x 3 with deviation 0.5. The paper's equation has no attention_weight.

    Deviations
        The sizes of pictures are not drawn: the maps of a part of a picture would be compared with all of it. What `custom_diffusion`
        says of pictures, words and steps holds here too. Any number of subjects; class names must differ from one another.
    """

    attention_weight: float = option(0.01, "weight of words being attended to with their class names, and these apart")
    attention_side: int = option(16, "side of the attention maps")
    max_train_steps: int = option(250, "optimizer steps")
    gradient_accumulation_steps: int = option(4, "such batches in a step, one after the other")
    learning_rate: float = option(8e-5, "step size")

    class_after: ClassVar = True
    paper: ClassVar = "arXiv:2403.18551"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "attention_weight")
        self.at_least(1, "attention_side")

    def learning(self, model: Model, weights: WordsAndWeights, subjects: Sequence[Subject]) -> Calibrating:
        names = [subject.class_name for subject in subjects]
        if len(set(names)) < len(names):
            raise UserError(
                f"the class names {', '.join(names)} are not distinct, and this method tells subjects apart by them; give others"
            )
        pictures = Scenes(model.arch, subjects, self, self.templates or TEMPLATE, lambda count: [tuple(range(count))], named)
        for prompt, shown in pictures.asked.items():
            if bare := [named(subject) for subject in shown if named(subject) not in prompt]:
                raise UserError(f"caption {prompt!r} has no {bare[0]!r}, and this method compares the two words; write the class name too")
        return Calibrating(model, weights, self, subjects, pictures)


class Calibrating(AttentiveDenoising):
    """Custom Diffusion's loss, and the overlaps of where words and class names are attended to."""

    def __init__(self, model: Model, weights: WordsAndWeights, method: DisenDiff, subjects: Sequence[Subject], pictures: Scenes) -> None:
        super().__init__(model, weights, Prompts(model.arch, method.cache, grad=True), method, subjects, pictures)
        self.calibrating, self.pictures = method, pictures

    def attention(self, samples: Samples, maps: AttentionMaps) -> tuple[Tensor, dict[str, float]]:
        errors = []
        for seen in self.looks(maps, samples, self.calibrating.attention_side, own_and_class_words):
            calm = [_calm(one) for one in seen]
            words, classes = calm[: len(calm) // 2], [one.square() for one in calm[len(calm) // 2 :]]
            bind = torch.stack([1 - _overlap(name.detach(), word) for name, word in zip(classes, words, strict=True)]).sum()
            apart = [_overlap(one, other) for one, other in combinations(classes, 2)]
            errors.append((bind + (torch.stack(apart).mean() if apart else 0)) / len(words))
        value = torch.stack(errors).mean()
        return self.calibrating.attention_weight * value, {"attention": value.item()}


def _calm(seen: Tensor) -> Tensor:
    """A map [h, w] from 0 to 1, blurred by a Gaussian of 3 x 3."""
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0], device=seen.device) / (2 * BLUR**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(minmax(seen.flatten()).view_as(seen)[None, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None].to(padded))[0, 0]


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """How much of two soft masks [h, w] is common: their intersection over their union."""
    both = (one * other).sum()
    return (both + SMOOTH) / ((one + other).sum() - both + SMOOTH)
