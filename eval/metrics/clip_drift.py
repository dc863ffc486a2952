"""CLIP drift: how much an edit changes the agreement of images with their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from eval.metrics.clip import ClipMetric
from toolkit.options import option


@dataclass(frozen=True)
class ClipDrift(ClipMetric):
    """CLIP-T after an edit minus before, each image with its own counterpart of the same prompt and seed.

        scale * (cos(f_image, f_text) - cos(f_reference, f_text))

    On prompts that an edit should leave alone, 0 is no drift. The pairs make the interval much narrower than that of two CLIP-Ts.
    """

    prefix: str = option("", "in front of every prompt")
    scale: float = option(1.0, "what the cosines are multiplied by")

    compares: ClassVar = "images"

    def measure(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        assert references is not None
        texts = [self.prefix + text for text in prompts]
        after, before = (self.encoders.similarity(side, texts) for side in (images, references))
        return self.scale * (after - before)[:, None]

    def measured_by(self) -> dict[str, Any]:
        return {**super().measured_by(), "prefix": self.prefix, "scale": self.scale}
