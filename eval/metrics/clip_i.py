"""CLIP-I: how alike images are to a CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from eval.metrics.clip import ClipMetric
from eval.metrics.image_similarity import ImageSimilarity


@dataclass(frozen=True)
class ClipI(ClipMetric, ImageSimilarity):
    """The cosine of CLIP image features; DreamBooth, Ruiz et al., arXiv 2208.12242."""

    compares: ClassVar = "images"
    paper: ClassVar = "arXiv:2208.12242"

    def features(self, images: Tensor) -> Tensor:
        return self.encoders.encode_images(images)

    def measured_by(self) -> dict[str, Any]:
        return {**ClipMetric.measured_by(self), **ImageSimilarity.measured_by(self)}
