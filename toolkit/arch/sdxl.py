"""Stable Diffusion XL: a UNet that reads two CLIP text encoders through cross-attention, and the second one's pooled output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from toolkit.arch.base import from_pretrained
from toolkit.arch.ldm import unet_key
from toolkit.arch.sd import LDM, SD, TINY_NOISE, TINY_TEXT, TINY_UNET, TINY_VAE, tiny_text_config, tiny_tokenizer
from toolkit.arch.single_file import from_single_file
from toolkit.arch.text import Text

TINY_TEXT_2: dict[str, Any] = {**TINY_TEXT, "hidden_size": 40, "projection_dim": 24, "hidden_act": "gelu"}
POOLED = "text_encoder_2.text_projection"
TINY_SIZES = 8  # width of the encoding of each of the six numbers about an image's size


class SDXL(SD):
    """StableDiffusionXLPipeline. The base model alone; a refiner is another model."""

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    single_files: ClassVar = {
        "sdxl": {**LDM, "text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
    }
    kohya_parts: ClassVar = {"denoiser": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if pipe.vae.config.force_upcast and pipe.vae.dtype == torch.float16:
            pipe.vae.to(torch.float32)  # its activations overflow half precision

    # --- making one ---------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, source: str, *, dtype: torch.dtype, **parts: Any) -> Self:
        read = from_single_file if Path(source).is_file() else from_pretrained
        return cls(read(StableDiffusionXLPipeline, source, dtype, add_watermarker=False, **parts))

    @classmethod
    def tiny(cls, *, seed: int = 0, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon") -> Self:
        tokenizer = tiny_tokenizer()
        sizes: dict[str, Any] = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TINY_SIZES,
            "projection_class_embeddings_input_dim": 6 * TINY_SIZES + TINY_TEXT_2["projection_dim"],
            "cross_attention_dim": TINY_TEXT["hidden_size"] + TINY_TEXT_2["hidden_size"],
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts: dict[str, Any] = {
                "vae": AutoencoderKL(**TINY_VAE),
                "text_encoder": CLIPTextModel(tiny_text_config(tokenizer, **TINY_TEXT)),
                "text_encoder_2": CLIPTextModelWithProjection(tiny_text_config(tokenizer, **TINY_TEXT_2)),
                "tokenizer": tokenizer,
                "tokenizer_2": tiny_tokenizer(),
                "unet": UNet2DConditionModel(**{**TINY_UNET, **sizes}),
                "scheduler": DDIMScheduler(**TINY_NOISE, prediction_type=prediction_type),
            }
        return cls(StableDiffusionXLPipeline(**parts, add_watermarker=False))

    # --- parts --------------------------------------------------------------------------------------------------
    def encoder_readers(self) -> dict[str, dict[str, nn.Linear]]:
        """Of the first encoder, whose last layer nobody reads, all but that one; of the second the pooled projection too."""
        readers = super().encoder_readers()
        del readers[[name for name in readers if name.startswith("text_encoder.")][-1]]
        return {**readers, POOLED: {POOLED: self.pipe.text_encoder_2.text_projection}}

    def encoder_parameters(self, layers: int | None = None) -> list[str]:
        """Of the first encoder without the last norm, which nobody reads either."""
        names = super().encoder_parameters(layers)
        return [name for name in names if not (name.startswith("text_encoder.") and "final_layer_norm." in name)]

    # --- text ---------------------------------------------------------------------------------------------------
    def encode(self, prompts: Sequence[str], *, grad: bool = False) -> Text:
        """hidden: both encoders' last hidden states but one, side by side. ids and length: the first tokenizer's."""
        ids, length = self.tokenize(prompts, "text_encoder")
        return self._encoded_by_both(ids, self.tokenize(prompts, "text_encoder_2")[0], length, grad)

    def encode_again(self, text: Text, *, grad: bool = False) -> Text:
        """The second tokenizer has the same words by the same ids, and its own padding."""
        inside = torch.arange(text.ids.shape[1], device=text.ids.device) < text.length[:, None]
        ids_2 = text.ids.masked_fill(~inside, self.pipe.tokenizer_2.pad_token_id)
        return self._encoded_by_both(text.ids, ids_2, text.length, grad)

    def _encoded_by_both(self, ids: Tensor, ids_2: Tensor, length: Tensor, grad: bool) -> Text:
        with torch.set_grad_enabled(grad):
            first = self.pipe.text_encoder(ids, output_hidden_states=True)
            second = self.pipe.text_encoder_2(ids_2, output_hidden_states=True)
            hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return Text(hidden, ids, length, second.text_embeds)

    def encode_negative(self, prompts: Sequence[str]) -> Text:
        text = self.encode(prompts)
        if self.pipe.config.force_zeros_for_empty_prompt:
            said = torch.tensor([bool(prompt) for prompt in prompts], device=text.hidden.device)
            pooled = None if text.pooled is None else text.pooled * said[:, None]
            return Text(text.hidden * said[:, None, None], text.ids, text.length, pooled)
        return text

    # --- noise ----------------------------------------------------------------------------------------------------
    def _predict(self, latents: Tensor, t: Tensor, text: Text) -> Tensor:
        if text.pooled is None:
            raise ValueError("SDXL reads the pooled text too")
        height, width = (side * self.downscale for side in latents.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=latents.device, dtype=self.dtype).expand(len(latents), -1)
        extra = {"text_embeds": text.pooled.to(self.dtype), "time_ids": sizes}
        hidden = text.hidden.to(self.dtype)
        output = self.pipe.unet(latents.to(self.dtype), t, encoder_hidden_states=hidden, added_cond_kwargs=extra).sample
        return output.to(latents.dtype)

    # --- other people's formats ---------------------------------------------------------------------------------
    def kohya_lora_keys(self, site: str) -> list[str]:
        keys = super().kohya_lora_keys(site)
        component, _, path = site.partition(".")
        if component != "denoiser":
            return keys
        original = unet_key(f"{path}.weight", self.pipe.unet.config).removesuffix(".weight")
        return [f"{self.kohya_parts[component]}_{original.replace('.', '_')}", *keys]  # Kohya's tools build on the original names

    def kohya_lora_header(self) -> dict[str, str]:
        return {
            **super().kohya_lora_header(),
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_v2": "False",
        }
