"""BLIP-ITC: how well images agree with their prompts, by BLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from eval.metrics.itc import ImageTextContrast
from toolkit.options import option


@dataclass(frozen=True)
class BlipItc(ImageTextContrast):
    """The cosine of BLIP's image-text contrastive features; Li et al., arXiv 2201.12086."""

    model: str = option("Salesforce/blip-itm-base-coco", "a BlipForImageTextRetrieval of transformers: hub id or folder")

    compares: ClassVar = "prompt"
    paper: ClassVar = "arXiv:2201.12086"
    model_class: ClassVar = "BlipForImageTextRetrieval"
    processor_class: ClassVar = "BlipProcessor"

    def cosines(self, model: Any, inputs: Any) -> Tensor:
        return model(**inputs, use_itm_head=False).itm_score
