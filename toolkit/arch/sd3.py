"""Stable Diffusion 3 and 3.5: a transformer that joins image tokens with those of two CLIP text encoders and of T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from toolkit.arch.base import from_pretrained
from toolkit.arch.flow import TINY_FLOW_VAE, TINY_T5, Flow, tiny_t5_config, tiny_t5_tokenizer
from toolkit.arch.sd import TINY_TEXT, TINY_VAE, tiny_text_config, tiny_tokenizer
from toolkit.arch.sdxl import TINY_TEXT_2
from toolkit.arch.text import Segment, Text
from toolkit.errors import UserError

T5_LENGTH = 256  # tokens; the pipeline's default

TINY_TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": TINY_VAE["latent_channels"],
    "out_channels": TINY_VAE["latent_channels"],
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": TINY_T5["d_model"],
    "pooled_projection_dim": TINY_TEXT["hidden_size"] + TINY_TEXT_2["projection_dim"],
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),  # as in 3.5 medium
    "qk_norm": "rms_norm",
}


class SD3(Flow):
    """StableDiffusion3Pipeline, with T5 or without it."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    default_guidance = 7.0

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.patch = pipe.transformer.config.patch_size
        self.image_size: int = pipe.transformer.config.sample_size * self.downscale

    # --- making one ---------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, source: str, *, dtype: torch.dtype, **parts: Any) -> Self:
        return cls(from_pretrained(StableDiffusion3Pipeline, source, dtype, **parts))

    @classmethod
    def tiny(cls, *, seed: int = 0) -> Self:
        tokenizer, tokenizer_3 = tiny_tokenizer(), tiny_t5_tokenizer()
        first = {**TINY_TEXT, "projection_dim": TINY_TEXT["hidden_size"]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts: dict[str, Any] = {
                "vae": AutoencoderKL(**TINY_FLOW_VAE),
                "text_encoder": CLIPTextModelWithProjection(tiny_text_config(tokenizer, **first)),
                "text_encoder_2": CLIPTextModelWithProjection(tiny_text_config(tokenizer, **TINY_TEXT_2)),
                "text_encoder_3": T5EncoderModel(tiny_t5_config(tokenizer_3)),
                "tokenizer": tokenizer,
                "tokenizer_2": tiny_tokenizer(),
                "tokenizer_3": tokenizer_3,
                "transformer": SD3Transformer2DModel(**TINY_TRANSFORMER),
                "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            }
        return cls(StableDiffusion3Pipeline(**parts))

    # --- text ---------------------------------------------------------------------------------------------------
    def encode(self, prompts: Sequence[str], *, grad: bool = False) -> Text:
        """hidden: the CLIPs' last hidden states but one side by side, filled up with zeros to T5's width; after them T5's.

        ids: the first tokenizer's, then T5's. A missing T5 gives zeros. With it, the CLIPs read the first 75 tokens of a
        longer prompt.
        """
        pipe = self.pipe
        cut = pipe.text_encoder_3 is not None
        ids, length = self.tokenize(prompts, "text_encoder", cut=cut)
        with torch.set_grad_enabled(grad):
            first = pipe.text_encoder(ids, output_hidden_states=True)
            second = pipe.text_encoder_2(self.tokenize(prompts, "text_encoder_2", cut=cut)[0], output_hidden_states=True)
            clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            clip = F.pad(clip, (0, pipe.transformer.config.joint_attention_dim - clip.shape[-1]))
            if pipe.text_encoder_3 is None:
                t5, t5_ids = clip.new_zeros(len(clip), T5_LENGTH, clip.shape[-1]), ids.new_zeros(len(ids), T5_LENGTH)
            else:
                t5, t5_ids, _ = self._encode_t5(prompts, "text_encoder_3", T5_LENGTH)
            pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
            return Text(torch.cat([clip, t5], dim=1), torch.cat([ids, t5_ids], dim=1), length, pooled)

    def _hidden_segments(self, text: Text) -> tuple[Segment, ...]:
        """The CLIPs' rows, and T5's where there is one."""
        count = self.pipe.text_encoder.config.max_position_embeddings
        clip = Segment(text.hidden[:, :count], text.ids[:, :count], text.length)
        if self.pipe.text_encoder_3 is None:
            return (clip,)
        ids = text.ids[:, count:]
        ends = ids == self.pipe.tokenizer_3.eos_token_id
        length = (ends * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(1)
        return clip, Segment(text.hidden[:, count:], ids, length, leading=0, causal=False)

    # --- images and noise ---------------------------------------------------------------------------------------
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        largest = self.pipe.transformer.config.pos_embed_max_size * self.downscale * self.patch
        if max(height, width) > largest:
            raise UserError(f"image size {height}x{width} is above the {largest} that the model has positions for; give a smaller one")
        return super().latent_shape(height, width)

    def _predict(self, latents: Tensor, t: Tensor, text: Text) -> Tensor:
        output = self.pipe.transformer(latents.to(self.dtype), timestep=t, **self._conditions(text)).sample
        return output.to(latents.dtype)
