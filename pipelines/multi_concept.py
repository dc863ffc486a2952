"""Several learned concepts in one image, as a pipeline for diffusers: each region of the image has its prompt and its edit.

    pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline="…/pipelines/multi_concept.py", trust_remote_code=True)
    toy = Region("a photo of a <toy>", box=(0, 0.3, 0.5, 1), edit=load_edit("toy.safetensors"))
    pipe("a photo of a beach", regions=[toy, …]).images

diffusers takes one pipeline from a file, so that of Stable Diffusion XL is in `pipelines/multi_concept_xl.py`, and those that begin with
an image are in `pipelines/multi_concept_variants.py`. All of them also load by themselves: `MultiConceptPipeline.from_pretrained(model)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from pipelines.attention.control import Word, controlled
from pipelines.attention.regional import Region, regional
from toolkit.arch.base import Architecture
from toolkit.arch.sd import SD
from toolkit.errors import UserError
from toolkit.model import Model


class MultiConcept:
    """What makes a diffusers pipeline take regions and controlled words; listed before the pipeline's class.

    family: the architecture of the pipeline.
    """

    family: ClassVar[type[Architecture]]

    @torch.no_grad()
    def __call__(self, *args: Any, regions: Sequence[Region] = (), words: Sequence[Word] = (), **options: Any) -> Any:
        """What the pipeline gives, with these regions in each of its images, and these words of its prompts controlled.

        The prompt is read where no region is, and the negative prompt everywhere, in a region through its edit. A pooled encoding, which
        Stable Diffusion XL reads as one vector for the whole image, is that of the prompt. All other arguments are the pipeline's own;
        `clip_skip` holds for the regions' prompts too. The new words of the regions' edits may be in every prompt.
        """
        pipe: Any = super()
        if not regions and not words:
            return pipe.__call__(*args, **options)
        arch = self.family.around(self)
        if any(parameter.is_meta for parameter in arch.components()["denoiser"].parameters()):
            what = "regions need" if regions else "controlled words need"
            raise UserError(f"the pipeline is offloaded layer by layer, {what} its layers; use enable_model_cpu_offload")

        def encode(prompts: list[str]) -> Tensor:
            one = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "clip_skip": options.get("clip_skip")}
            return pipe.encode_prompt(prompt=prompts, device=arch.device, **one)[0]

        model = Model(arch)
        with ExitStack() as stack:
            self._regions = stack.enter_context(regional(model, regions, encode=encode)) if regions else None
            stack.callback(delattr, self, "_regions")
            self._words = stack.enter_context(controlled(model, words)) if words else None
            stack.callback(delattr, self, "_words")
            return pipe.__call__(*args, **options)

    def encode_prompt(self, *args: Any, **options: Any) -> Any:
        """As the pipeline does; regions and words learn what its batches will hold: under guidance the negative prompts come first."""
        pipe: Any = super()
        encoded = pipe.encode_prompt(*args, **options)
        prompt, negative = encoded[:2]
        if regions := getattr(self, "_regions", None):
            regions.tell([None] if negative is None else [negative, None], len(prompt))
        if words := getattr(self, "_words", None):
            given = inspect.signature(pipe.encode_prompt).bind(*args, **options).arguments
            said = [given["prompt"]] if isinstance(given["prompt"], str) else given["prompt"]
            if said is None or given.get("prompt_2") not in (None, given["prompt"]):
                raise UserError("words are controlled, which are looked for in one prompt for all text encoders; give it, and no prompt_2")
            each = [one for one in said for _ in range(len(prompt) // len(said))]
            words.tell([each] if negative is None else [None, each], len(prompt))
        return encoded


class MultiConceptPipeline(MultiConcept, StableDiffusionPipeline):
    """`StableDiffusionPipeline` (1 and 2) with `regions`; see `MultiConcept`."""

    family = SD
