"""Flux.1 dev and schnell: a transformer that joins image tokens with those of T5, and reads CLIP's pooled output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from toolkit.arch.base import from_pretrained
from toolkit.arch.flow import TINY_FLOW_VAE, TINY_T5, Flow, by_attention, tiny_t5_config, tiny_t5_tokenizer
from toolkit.arch.sd import TINY_TEXT, TINY_VAE, tiny_text_config, tiny_tokenizer
from toolkit.arch.text import Segment, Text

TINY_TRANSFORMER: dict[str, Any] = {
    "in_channels": 4 * TINY_VAE["latent_channels"],
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TINY_T5["d_model"],
    "pooled_projection_dim": TINY_TEXT["hidden_size"],
    "axes_dims_rope": (4, 4, 8),
}


class Flux(Flow):
    """FluxPipeline: dev, which reads the guidance scale (`distilled_guidance`), and schnell, which needs none.

    Text without `guidance`, which is what trainers encode, is read at a scale of 1.
    """

    name = "flux"
    pipelines = ("FluxPipeline",)
    patch = 2  # the pipeline packs 2x2 latents into one token

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.distilled_guidance: bool = pipe.transformer.config.guidance_embeds
        self.default_guidance = 3.5 if self.distilled_guidance else 1.0
        self.t5_length = 512 if self.distilled_guidance else 256  # tokens; schnell knows no more
        self.image_size: int = pipe.vae.config.sample_size

    # --- making one ---------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, source: str, *, dtype: torch.dtype, **parts: Any) -> Self:
        return cls(from_pretrained(FluxPipeline, source, dtype, **parts))

    @classmethod
    def tiny(cls, *, seed: int = 0, distilled: bool = True) -> Self:
        """distilled: dev, else schnell."""
        tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_t5_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts: dict[str, Any] = {
                "vae": AutoencoderKL(**TINY_FLOW_VAE),
                "text_encoder": CLIPTextModel(tiny_text_config(tokenizer, **TINY_TEXT)),
                "text_encoder_2": T5EncoderModel(tiny_t5_config(tokenizer_2)),
                "tokenizer": tokenizer,
                "tokenizer_2": tokenizer_2,
                "transformer": FluxTransformer2DModel(**TINY_TRANSFORMER, guidance_embeds=distilled),
                "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled),
            }
        return cls(FluxPipeline(**parts))

    # --- parts --------------------------------------------------------------------------------------------------
    def text_readers(self) -> dict[str, dict[str, nn.Linear]]:
        """Those of the joint attentions, and the keys and values of the later blocks, which read text and image in one sequence."""
        attention = self.denoiser_linears(".attn.to_k", ".attn.to_v")
        single = {site: linear for site, linear in attention.items() if ".single_transformer_blocks." in site}
        return {**super().text_readers(), **by_attention(single)}

    # --- text ---------------------------------------------------------------------------------------------------
    def encode(self, prompts: Sequence[str], *, grad: bool = False) -> Text:
        """hidden, ids and length: T5's. pooled: CLIP's, which reads the first 75 tokens of a longer prompt."""
        with torch.set_grad_enabled(grad):
            hidden, ids, length = self._encode_t5(prompts, "text_encoder_2", self.t5_length)
            pooled = self.pipe.text_encoder(self.tokenize(prompts, "text_encoder", cut=True)[0]).pooler_output
        return Text(hidden, ids, length, pooled)

    def _hidden_segments(self, text: Text) -> tuple[Segment, ...]:
        return (Segment(text.hidden, text.ids, text.length, leading=0, causal=False),)

    # --- images and noise ---------------------------------------------------------------------------------------
    def _predict(self, latents: Tensor, t: Tensor, text: Text) -> Tensor:
        count, _, rows, columns = latents.shape
        guidance = None
        if self.distilled_guidance:
            guidance = torch.ones(count, device=latents.device) if text.guidance is None else text.guidance
        output = self.pipe.transformer(
            FluxPipeline._pack_latents(latents.to(self.dtype).contiguous(), *latents.shape),
            timestep=t / self.train_timesteps,
            guidance=guidance,
            txt_ids=torch.zeros(text.hidden.shape[1], 3, device=latents.device),
            img_ids=FluxPipeline._prepare_latent_image_ids(count, rows // 2, columns // 2, latents.device, torch.float32),
            **self._conditions(text),
        ).sample
        unpacked = FluxPipeline._unpack_latents(output, rows * self.downscale, columns * self.downscale, self.downscale)
        return unpacked.to(latents.dtype)

    def _sigmas(self, steps: int) -> list[float]:
        return np.linspace(1.0, 1 / steps, steps).tolist()
