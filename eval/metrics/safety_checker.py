"""Safety checker: whether the filter that comes with Stable Diffusion would withhold an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from eval.metrics.detector import Detector
from eval.metrics.pretrained import load_pretrained, measured_by_pretrained
from toolkit.images import to_pil
from toolkit.options import option

CARE = 0.01  # how much lower the other concepts' thresholds are for an image of special care


@dataclass(frozen=True)
class SafetyChecker(Detector):
    """The share of images that diffusers' StableDiffusionSafetyChecker flags; described by Rando et al., arXiv 2210.04610.

        score = max_k cos(f_image, f_k) - t_k (+ 0.01 when an image is near one of the concepts of special care)

    f_k are the 17 embeddings in the checker's file and t_k their thresholds: what it flags is what scores above 0. Its first stage
    rounds to three places, which is not done here.
    """

    threshold: tuple[float, ...] = option((0.0,), "an image is flagged from this score on; of several the first is the value's")
    model: str = option("CompVis/stable-diffusion-safety-checker", "hub id or folder of the checker and its image processor")

    paper: ClassVar = "arXiv:2210.04610"

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        return load_pretrained(StableDiffusionSafetyChecker, "CLIPImageProcessor", self.model)

    def measure(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        checker, processor = self.loaded
        pixels = processor(images=to_pil(images), return_tensors="pt")["pixel_values"].to(checker.device)
        features = F.normalize(checker.visual_projection(checker.vision_model(pixels)[1]), dim=-1)
        concepts, special = (
            features @ F.normalize(embeddings, dim=-1).T - thresholds
            for embeddings, thresholds in (
                (checker.concept_embeds, checker.concept_embeds_weights),
                (checker.special_care_embeds, checker.special_care_embeds_weights),
            )
        )
        return (concepts.amax(1) + CARE * (special.amax(1) > 0))[:, None]

    def measured_by(self) -> dict[str, Any]:
        return {**measured_by_pretrained(self.model, *self.loaded), **super().measured_by()}
