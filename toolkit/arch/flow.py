"""What rectified-flow transformers have in common: straight paths to noise, T5, a pooled text, and a shifted image latent."""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import T5Config, T5Tokenizer

from toolkit.arch.encoders import Encoders
from toolkit.arch.sd import LORA_PROJECTIONS, TINY_VAE
from toolkit.arch.text import Segment, Stream, Text
from toolkit.errors import UserError

TEXT_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

TINY_T5: dict[str, Any] = {
    "d_model": 80,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
    "tie_word_embeddings": False,
}
TINY_FLOW_VAE: dict[str, Any] = {
    **TINY_VAE,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


class Flow(Encoders, ABC):
    """Rectified flow: x_t = (1 - sigma) x_0 + sigma eps, and the denoiser's output is the velocity v = eps - x_0.

    Timesteps are sigma in thousandths (of `train_timesteps`), whole or not: t = 250 is x_0 with a quarter of it replaced
    by noise. The shift that the family samples with is in the scheduler's timesteps, not in what a timestep means.
    """

    denoiser = "transformer"
    patch: int  # latent rows and columns that one image token stands for

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            given = f"the model's scheduler is {type(pipe.scheduler).__name__}, need FlowMatchEulerDiscreteScheduler"
            raise UserError(f"{given}; check its scheduler_config.json")
        config: Any = pipe.scheduler.config
        self.train_timesteps: int = config.num_train_timesteps
        self.downscale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)

    # --- parts --------------------------------------------------------------------------------------------------
    def text_linears(self) -> dict[str, nn.Linear]:
        return {site: linear for stream in self.text_streams().values() for site, linear in stream.linears.items()}

    def text_streams(self) -> dict[str, Stream]:
        """hidden: the token rows. pooled: one row for each prompt, which is added to the encoded timestep."""
        denoiser = self.pipe.transformer
        pooled = {"denoiser.time_text_embed.text_embedder.linear_1": denoiser.time_text_embed.text_embedder.linear_1}
        return {
            "hidden": Stream({"denoiser.context_embedder": denoiser.context_embedder}, self._hidden_segments),
            "pooled": Stream(pooled, _pooled_segments),
        }

    def text_readers(self) -> dict[str, dict[str, nn.Linear]]:
        """The text's keys and values in each joint attention."""
        return by_attention(self.denoiser_linears(".attn.add_k_proj", ".attn.add_v_proj"))

    @abstractmethod
    def _hidden_segments(self, text: Text) -> tuple[Segment, ...]:
        """The hidden state by encoders."""

    def lora_targets(self) -> dict[str, nn.Linear]:
        return self.denoiser_linears(*(f".attn.{linear}" for linear in (*LORA_PROJECTIONS, *TEXT_PROJECTIONS)))

    def attention_sites(self) -> dict[str, nn.Module]:
        modules = self.pipe.transformer.named_modules()
        return {f"denoiser.{name}": module for name, module in modules if name.endswith((".attn", ".attn2"))}

    # --- text ---------------------------------------------------------------------------------------------------
    def _encode_t5(self, prompts: Sequence[str], component: str, longest: int) -> tuple[Tensor, Tensor, Tensor]:
        """T5's hidden state [n, longest, d], padding included as in diffusers, its token ids and their number up to EOT."""
        ids, length = self.tokenize(prompts, component, longest)
        return self._encoders()[component](ids).last_hidden_state, ids, length

    def _conditions(self, text: Text) -> dict[str, Tensor]:
        """What the denoiser reads of the text, by the names of its arguments."""
        if text.pooled is None:
            raise ValueError(f"{self.name} reads the pooled text too")
        return {"encoder_hidden_states": text.hidden.to(self.dtype), "pooled_projections": text.pooled.to(self.dtype)}

    # --- images and noise ---------------------------------------------------------------------------------------
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        multiple = self.downscale * self.patch
        if height % multiple or width % multiple:
            raise UserError(f"image size {height}x{width} is not a multiple of {multiple}; give one, e.g. {self.image_size}")
        return self.pipe.vae.config.latent_channels, height // self.downscale, width // self.downscale

    def encode_images(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        return (vae.encode(pixels.to(vae.dtype)).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.decode((latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (t / self.train_timesteps).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def to_x0(self, output: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        _, sigma = self.signal_and_noise(t)
        return latents - sigma * output

    def to_eps(self, output: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        alpha, _ = self.signal_and_noise(t)
        return latents + alpha * output

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def scheduler(self, steps: int, latent_shape: tuple[int, int, int] | None = None) -> FlowMatchEulerDiscreteScheduler:
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config, stochastic_sampling=False)
        config = scheduler.config
        _, rows, columns = latent_shape or self.latent_shape(self.image_size, self.image_size)
        tokens = (rows // self.patch) * (columns // self.patch)
        mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        scheduler.set_timesteps(steps, device=self.device, sigmas=self._sigmas(steps), mu=mu)  # mu counts with dynamic shifting only
        return scheduler

    def _sigmas(self, steps: int) -> list[float] | None:
        """Noise levels before the shift, None is the scheduler's own."""
        return None


def by_attention(linears: Mapping[str, nn.Linear]) -> dict[str, dict[str, nn.Linear]]:
    """Attention's site -> its linear layers."""
    sites = dict.fromkeys(site.rpartition(".")[0] for site in linears)
    return {name: {site: linear for site, linear in linears.items() if site.rpartition(".")[0] == name} for name in sites}


def _pooled_segments(text: Text) -> tuple[Segment, ...]:
    if text.pooled is None:
        raise ValueError("the text was encoded without its pooled state")
    return (Segment(text.pooled[:, None], None, torch.ones_like(text.length), leading=0, causal=False),)


def tiny_t5_tokenizer() -> T5Tokenizer:
    """T5's Unigram over letters and a few whole words; </s> ends a prompt, nothing begins it."""
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0, **dict.fromkeys(string.printable.strip(), -6.0)}
    return T5Tokenizer([*pieces.items(), ("▁photo", -3.0), ("▁picture", -3.0)], extra_ids=0, model_max_length=512)


def tiny_t5_config(tokenizer: T5Tokenizer) -> T5Config:
    """For an encoder that reads this tokenizer's words and, as the real ones, has a few embedding rows more."""
    return T5Config(vocab_size=len(tokenizer) + 8, **TINY_T5)
