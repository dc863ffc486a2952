"""DINO-I: how alike images are to a DINO."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from eval.metrics.image_similarity import ImageSimilarity
from eval.metrics.pretrained import load_pretrained, measured_by_pretrained
from toolkit.images import to_pil
from toolkit.options import option


@dataclass(frozen=True)
class DinoI(ImageSimilarity):
    """The cosine of the class tokens of a DINO; DreamBooth, Ruiz et al., arXiv 2208.12242, which has ViT-S/16, the default here."""

    model: str = option("facebook/dino-vits16", "a vision transformer of transformers: hub id or folder")

    compares: ClassVar = "images"
    paper: ClassVar = "arXiv:2208.12242"

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return load_pretrained("AutoModel", "AutoImageProcessor", self.model)

    def features(self, images: Tensor) -> Tensor:
        model, processor = self.loaded
        pixels = processor(images=to_pil(images), return_tensors="pt")["pixel_values"]
        return model(pixels.to(model.device)).last_hidden_state[:, 0]

    def measured_by(self) -> dict[str, Any]:
        return {**measured_by_pretrained(self.model, *self.loaded), **super().measured_by()}
