"""Several learned concepts in one image that begins with another one, or in a part of it; see `pipelines/multi_concept.py`.

MultiConceptInpaintPipeline.from_pipe(pipe)("a beach", image=image, mask_image=mask, regions=[...])
"""

from __future__ import annotations

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import StableDiffusionXLImg2ImgPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint import StableDiffusionXLInpaintPipeline

from pipelines.multi_concept import MultiConcept
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL


class MultiConceptImg2ImgPipeline(MultiConcept, StableDiffusionImg2ImgPipeline):
    """`StableDiffusionImg2ImgPipeline` with `regions`."""

    family = SD


class MultiConceptInpaintPipeline(MultiConcept, StableDiffusionInpaintPipeline):
    """`StableDiffusionInpaintPipeline` with `regions`."""

    family = SD


class MultiConceptXLImg2ImgPipeline(MultiConcept, StableDiffusionXLImg2ImgPipeline):
    """`StableDiffusionXLImg2ImgPipeline` with `regions`."""

    family = SDXL


class MultiConceptXLInpaintPipeline(MultiConcept, StableDiffusionXLInpaintPipeline):
    """`StableDiffusionXLInpaintPipeline` with `regions`."""

    family = SDXL
