"""Several learned concepts in one image of Stable Diffusion XL; see `pipelines/multi_concept.py`."""

from __future__ import annotations

from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from pipelines.multi_concept import MultiConcept
from toolkit.arch.sdxl import SDXL


class MultiConceptXLPipeline(MultiConcept, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with `regions`; see `MultiConcept`."""

    family = SDXL
