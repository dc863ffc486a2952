"""CLIP-T: how well images agree with their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from eval.metrics.clip import ClipMetric
from toolkit.options import option


@dataclass(frozen=True)
class ClipT(ClipMetric):
    """The cosine of an image's and its prompt's CLIP features; CLIPScore, Hessel et al., arXiv 2104.08718.

        scale * cos(f_image, f_text(prefix + prompt))

    CLIPScore itself has the prefix "A photo depicts ", the scale 2.5, and 0 in place of a negative cosine, which is not done here.
    Papers write the cosine, or (torchmetrics) 100 times it: both the prefix and the scale are said with every value.
    """

    prefix: str = option("", "in front of every prompt")
    scale: float = option(1.0, "what the cosine is multiplied by")

    compares: ClassVar = "prompt"
    paper: ClassVar = "arXiv:2104.08718"

    def measure(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        return self.scale * self.encoders.similarity(images, [self.prefix + text for text in prompts])[:, None]

    def measured_by(self) -> dict[str, Any]:
        return {**super().measured_by(), "prefix": self.prefix, "scale": self.scale}
