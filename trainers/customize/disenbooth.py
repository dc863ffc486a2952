"""DisenBooth: DreamBooth with a second condition, an image's own, which takes up what a picture shows beside the subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.concepts import Subject, named
from toolkit.method import option
from trainers.customize.dreambooth_lora import DreamBoothLora
from trainers.image_features import CLIP, features_of, two_layers
from trainers.preservation import PreservedDenoising
from trainers.subjects import Photos, Samples
from trainers.weights import Trainable, WithAuxiliary

if TYPE_CHECKING:
    from toolkit.model import Model

TEMPLATES = ("a {}",)


@dataclass(frozen=True)
class DisenBooth(DreamBoothLora):
    """DisenBooth: Identity-Preserving Disentangled Tuning for Subject-Driven Text-to-Image Generation, Chen et al., arXiv 2305.03374.

    Equation
        min_{A, B, h}  E_{z, y, eps, t}  || eps - e(z_t, t, c(y) + h(f)) ||^2  +  weak_weight || eps - e(z_t, t, c(y)) ||^2
                                       +  contrast_weight cos( c(y)[EOT], h(f) )
        h(f) = MLP(s(m) * f) + s(m) * f
        with e the denoiser with low-rank factors in its attention, as in `dreambooth_lora`; z the latent of a picture, y a prompt with
        the subject's word and its class, f the picture's pooled CLIP feature, h the image adapter with a mask m over features and the
        sigmoid s; h(f) is added to every row of c(y). The picture is explained by both together; the weak term keeps the subject in
        the text, and the last one keeps the two apart. On a model that predicts velocity the same is done in velocities.

    Shapes
        f, m: [k], of the CLIP. h(f): [d], the width of what the denoiser reads. c(y): [tokens, d]. z, eps: [batch, c, h', w'].

    Defaults
        The official code's and its script's: weak_weight 0.01, contrast_weight 0.001, rank 4 in every attention's projections, step
        size 1e-4, one picture in a step, 2000 steps (its page: about 1000 for cats and dogs), "a sks dog". m starts at 0. Its CLIP is
        the one whose text half its model reads: for SD 2 that is hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K.

    Deviations
        The edit is the low-rank change alone, which is what the subject needs: the adapter is not kept, so that pictures with a given
        picture's background, the paper's other use, are not offered. The cosine is taken at the end of text and for each sample; the
        official code takes the mean over the tokens, and of more than one picture the cosine over the pictures instead of the width,
        of every picture with every other. Pictures reach the CLIP cut as the denoiser sees them and normalised as the CLIP was
        trained; the official code trains on pixels from -1 to 1 and samples with normalised ones. The norm of the gradient is
        clipped over all that is trained; the official code leaves the adapter out. Where a CLIP's features are not as wide as what the
        denoiser reads, h's residual goes through a linear map too. On SDXL the pooled encoding is the prompt's. `prior` is off, and
        acts when it is asked for; the official flag for it has the class's pictures learnt as the subject's. Masks hold for
        both errors: then there is nothing of the background that h could explain. What `dreambooth_lora` says of its own deviations
        holds here too. h starts at half of f, so that the size of a CLIP's features beside the text's rows decides how much a picture
        says from the start: about 0.37 for the official pair, 1.4 for the embedded world's, which `feature_size` changes.
    """

    clip: str | None = option(None, f"CLIP {CLIP}")
    weak_weight: float = option(0.01, "weight of the error without the image's condition")
    contrast_weight: float = option(0.001, "weight of the cosine of the two conditions")
    feature_size: float | None = option(None, "mean norm that features get, in parts of a text row's; none: what the CLIP gives")
    max_train_steps: int = option(2000, "optimizer steps")

    paper: ClassVar = "arXiv:2305.03374"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "weak_weight", "contrast_weight")
        if self.feature_size is not None:
            self.more_than(0, "feature_size")

    def learning(self, model: Model, weights: Trainable, subjects: Sequence[Subject]) -> Disentangling:
        pictures = Photos.of(model.arch, subjects, self, TEMPLATES, named)
        features, text = features_of(model, pictures, self.clip), model.arch.encode([""]).hidden.float()
        if self.feature_size is not None:
            features = features * (self.feature_size * text.norm(dim=-1).mean() / features.norm(dim=-1).mean())
        adapter = ImageAdapter(features.shape[1], text.shape[-1], self.seed).to(model.arch.device)
        return Disentangling(model, weights, adapter, features, self, subjects, pictures)


class ImageAdapter(nn.Module):
    """Features [n, k] -> what is added to every row of the text [n, d]."""

    def __init__(self, inputs: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(inputs))
        self.residual = two_layers(inputs, outputs, "image adapter", seed)
        self.straight = nn.Identity() if inputs == outputs else two_layers(inputs, outputs, "image adapter, straight", seed)[-1]

    def forward(self, features: Tensor) -> Tensor:
        kept = self.mask.sigmoid() * features
        return self.residual(kept) + self.straight(kept)


class Disentangling(PreservedDenoising):
    """The error with both conditions, the weak one with the text alone, and the cosine of the two."""

    def __init__(
        self,
        model: Model,
        weights: Trainable,
        adapter: ImageAdapter,
        features: Tensor,
        method: DisenBooth,
        subjects: Sequence[Subject],
        pictures: Photos,
    ) -> None:
        super().__init__(model, WithAuxiliary(weights, adapter), method.text(model), method, subjects, pictures)
        self.adapter, self.features, self.disentangling = adapter, features, method

    def learnt(self, samples: Samples, output: Tensor) -> Tensor:
        text, image = self.text(samples.prompts), self.adapter(self.features[list(samples.rows)])
        both = replace(text, hidden=text.hidden + image[:, None].to(text.hidden))
        joint = self.error(samples, self.arch.predict(self.noisy(samples), samples.t, both))
        alike = F.cosine_similarity(text.ends().float(), image.float(), dim=-1).mean()
        return joint + self.disentangling.weak_weight * self.error(samples, output) + self.disentangling.contrast_weight * alike
