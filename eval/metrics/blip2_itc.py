"""BLIP2-ITC: how well images agree with their prompts, by BLIP-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from eval.metrics.itc import ImageTextContrast
from toolkit.options import option


@dataclass(frozen=True)
class Blip2Itc(ImageTextContrast):
    """The cosine of a prompt and that query of the Q-Former which agrees most; BLIP-2, Li et al., arXiv 2301.12597."""

    model: str = option("Salesforce/blip2-itm-vit-g", "a Blip2ForImageTextRetrieval of transformers: hub id or folder")

    compares: ClassVar = "prompt"
    paper: ClassVar = "arXiv:2301.12597"
    model_class: ClassVar = "Blip2ForImageTextRetrieval"
    processor_class: ClassVar = "Blip2Processor"

    def cosines(self, model: Any, inputs: Any) -> Tensor:
        return model(**inputs, use_image_text_matching_head=False).logits_per_image
