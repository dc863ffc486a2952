"""What the image-text contrastive scores of BLIP and BLIP-2 share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from eval.metrics.base import Metric
from eval.metrics.pretrained import load_pretrained, measured_by_pretrained
from toolkit.images import to_pil
from toolkit.options import option


@dataclass(frozen=True)
class ImageTextContrast(Metric, ABC):
    """The cosine of an image's and its prompt's features before the matching head."""

    model: str = option("", "hub id or folder")
    prefix: str = option("", "in front of every prompt")
    scale: float = option(1.0, "what the cosine is multiplied by")

    compares: ClassVar = "prompt"
    model_class: ClassVar[str]
    processor_class: ClassVar[str]

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return load_pretrained(self.model_class, self.processor_class, self.model)

    @abstractmethod
    def cosines(self, model: Any, inputs: Any) -> Tensor:
        """Of every image and every text of the inputs [images, texts]."""

    def measure(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        model, processor = self.loaded
        texts = [self.prefix + text for text in prompts]
        unique = list(dict.fromkeys(texts))
        inputs = processor(images=to_pil(images), text=unique, return_tensors="pt", padding=True, truncation=True).to(model.device)
        table = self.cosines(model, inputs).float()
        return self.scale * table[range(len(texts)), [unique.index(text) for text in texts]][:, None]

    def measured_by(self) -> dict[str, Any]:
        return {**measured_by_pretrained(self.model, *self.loaded), "prefix": self.prefix, "scale": self.scale}
