"""Several learned concepts in one image, as a pipeline for diffusers: each region of the image has its prompt and its edit.

    pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline="…/pipelines/multi_concept.py", trust_remote_code=True)
    toy = Region("a photo of a <toy>", box=(0, 0.3, 0.5, 1), edit=load_edit("toy.safetensors"))
    pipe("a photo of a beach", regions=[toy, …]).images

diffusers takes one pipeline from a file, so that of Stable Diffusion XL is in `pipelines/multi_concept_xl.py`, and those that begin with
an image are in `pipelines/multi_concept_variants.py`. All of them also load by themselves: `MultiConceptPipeline.from_pretrained(model)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from pipelines.attention.regional import Region, regional
from toolkit.arch.base import Architecture
from toolkit.arch.sd import SD
from toolkit.errors import UserError
from toolkit.model import Model


class MultiConcept:
    """What makes a diffusers pipeline take regions; listed before the pipeline's class.

    family: the architecture of the pipeline.
    """

    family: ClassVar[type[Architecture]]

    @torch.no_grad()
    def __call__(self, *args: Any, regions: Sequence[Region] = (), **options: Any) -> Any:
        """What the pipeline gives, with these regions in each of its images.

        The prompt is read where no region is, and the negative prompt everywhere, in a region through its edit. A pooled encoding, which
        Stable Diffusion XL reads as one vector for the whole image, is that of the prompt. All other arguments are the pipeline's own;
        `clip_skip` holds for the regions' prompts too. The new words of the regions' edits may be in every prompt.
        """
        pipe: Any = super()
        if not regions:
            return pipe.__call__(*args, **options)
        arch = self.family.around(self)
        if any(parameter.is_meta for parameter in arch.components()["denoiser"].parameters()):
            raise UserError("the pipeline is offloaded layer by layer, regions need its layers; use enable_model_cpu_offload")

        def encode(prompts: list[str]) -> Tensor:
            one = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "clip_skip": options.get("clip_skip")}
            return pipe.encode_prompt(prompt=prompts, device=arch.device, **one)[0]

        with regional(Model(arch), regions, encode=encode) as self._acting:
            try:
                return pipe.__call__(*args, **options)
            finally:
                del self._acting

    def encode_prompt(self, *args: Any, **options: Any) -> Any:
        """As the pipeline does; the regions learn what its batches will hold: under guidance the negative prompts come first."""
        pipe: Any = super()
        encoded = pipe.encode_prompt(*args, **options)
        if acting := getattr(self, "_acting", None):
            prompt, negative = encoded[:2]
            acting.tell([None] if negative is None else [negative, None], len(prompt))
        return encoded


class MultiConceptPipeline(MultiConcept, StableDiffusionPipeline):
    """`StableDiffusionPipeline` (1 and 2) with `regions`; see `MultiConcept`."""

    family = SD
