"""Stable Diffusion 1 and 2: a UNet that reads one CLIP text encoder through cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toolkit.arch.base import from_pretrained
from toolkit.arch.encoders import Encoders
from toolkit.arch.single_file import from_single_file
from toolkit.arch.text import Text
from toolkit.errors import UserError

LORA_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
ENCODER_PROJECTIONS = ("k_proj", "v_proj")
ENCODER_LORA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
V2_TEXT_WIDTH = 1024  # of the text encoder of Stable Diffusion 2; that of 1 has 768
LDM = {"denoiser": "model.diffusion_model.", "vae": "first_stage_model."}  # how keys begin in single files

TINY_TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": TINY_TEXT["hidden_size"],
    "norm_num_groups": 4,
}
TINY_VAE: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
TINY_NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class SD(Encoders):
    """StableDiffusionPipeline, with noise (epsilon) or velocity (v) prediction as the scheduler's configuration says."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline",)
    denoiser = "unet"
    single_files: ClassVar = {
        "sd1": {**LDM, "text_encoder": "cond_stage_model.transformer."},
        "sd2": {**LDM, "text_encoder": "cond_stage_model.model."},
    }
    kohya_parts: ClassVar[dict[str, str]] = {"denoiser": "lora_unet", "text_encoder": "lora_te"}

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        noising: Any = DDPMScheduler.from_config(pipe.scheduler.config)
        self.prediction_type: str = noising.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"the model predicts {self.prediction_type!r}, need epsilon or v_prediction; check its scheduler_config.json")
        self.alphas_cumprod: Tensor = noising.alphas_cumprod  # alpha_t^2, [train_timesteps]
        self.train_timesteps: int = noising.config.num_train_timesteps
        self.downscale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self.image_size: int = pipe.unet.config.sample_size * self.downscale

    # --- making one ---------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, source: str, *, dtype: torch.dtype, **parts: Any) -> Self:
        read = from_single_file if Path(source).is_file() else from_pretrained
        return cls(read(StableDiffusionPipeline, source, dtype, safety_checker=None, requires_safety_checker=False, **parts))

    @classmethod
    def tiny(cls, *, seed: int = 0, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon") -> Self:
        tokenizer = tiny_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts: dict[str, Any] = {
                "vae": AutoencoderKL(**TINY_VAE),
                "text_encoder": CLIPTextModel(tiny_text_config(tokenizer, **TINY_TEXT)),
                "tokenizer": tokenizer,
                "unet": UNet2DConditionModel(**TINY_UNET),
                "scheduler": DDIMScheduler(**TINY_NOISE, prediction_type=prediction_type),
                "safety_checker": None,
                "feature_extractor": None,
            }
        return cls(StableDiffusionPipeline(**parts, requires_safety_checker=False))

    # --- parts --------------------------------------------------------------------------------------------------
    def text_linears(self) -> dict[str, nn.Linear]:
        return self.denoiser_linears("attn2.to_k", "attn2.to_v")

    def value_linears(self) -> dict[str, nn.Linear]:
        return self.denoiser_linears("attn2.to_v")

    def encoder_readers(self) -> dict[str, dict[str, nn.Linear]]:
        return {
            f"{component}.{name}": {f"{component}.{name}.{linear}": module.get_submodule(linear) for linear in ENCODER_PROJECTIONS}
            for component, encoder in self._encoders().items()
            for name, module in encoder.named_modules()
            if name.endswith(".self_attn")
        }

    def encoder_mlps_and_last_attention(self) -> list[str]:
        attentions = [name for name in self.encoder_readers() if name.endswith(".self_attn")]  # of the layers that are read
        last = {name.partition(".")[0]: name for name in attentions}.values()
        within = tuple(f"{module}." for module in (*last, *(name.replace(".self_attn", ".mlp") for name in attentions)))
        return [name for name in self._encoder_names() if name.startswith(within)]

    def encoder_parameters(self, layers: int | None = None) -> list[str]:
        found = [name.removesuffix("self_attn") for name in self.encoder_readers() if name.endswith(".self_attn")]
        each = [[name for name in found if name.startswith(f"{part}.")] for part in self._encoders()]
        if layers is not None and layers > max(map(len, each)):
            raise UserError(f"layers is {layers}, and {max(map(len, each))} layers of the text encoder are read; give no more than these")
        within = tuple(name for names in each for name in names[:layers])
        followed = [name for name in self._encoder_names() if ".layers." not in name and "embeddings." not in name]
        return [name for name in self._encoder_names() if name.startswith(within) or (layers is None and name in followed)]

    def _encoder_names(self) -> list[str]:
        return [f"{part}.{name}" for part, encoder in self._encoders().items() for name, _ in encoder.named_parameters()]

    def lora_targets(self) -> dict[str, nn.Linear]:
        return self.denoiser_linears(*(f"{attention}.{linear}" for attention in ("attn1", "attn2") for linear in LORA_PROJECTIONS))

    def encoder_lora_targets(self) -> dict[str, nn.Linear]:
        attentions = [name for name in self.encoder_readers() if name.endswith(".self_attn")]
        sites = [f"{name}.{linear}" for name in attentions for linear in ENCODER_LORA_PROJECTIONS]
        parts = self._encoders()
        return {site: parts[component].get_submodule(path) for site in sites for component, _, path in [site.partition(".")]}

    def attention_sites(self) -> dict[str, nn.Module]:
        return {f"denoiser.{name}": module for name, module in self.pipe.unet.named_modules() if name.endswith(("attn1", "attn2"))}

    # --- text ---------------------------------------------------------------------------------------------------
    def encode(self, prompts: Sequence[str], *, grad: bool = False) -> Text:
        return self._encoded(*self.tokenize(prompts, "text_encoder"), grad)

    def encode_again(self, text: Text, *, grad: bool = False) -> Text:
        return self._encoded(text.ids, text.length, grad)

    def _encoded(self, ids: Tensor, length: Tensor, grad: bool) -> Text:
        with torch.set_grad_enabled(grad):
            hidden = self.pipe.text_encoder(ids).last_hidden_state
        return Text(hidden, ids, length)

    # --- images and noise ---------------------------------------------------------------------------------------
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        if height % self.downscale or width % self.downscale:
            raise UserError(f"image size {height}x{width} is not a multiple of {self.downscale}; give one, e.g. {self.image_size}")
        return self.pipe.unet.config.in_channels, height // self.downscale, width // self.downscale

    def encode_images(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.encode(pixels.to(vae.dtype)).latent_dist.mean * vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_squared = self.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def _predict(self, latents: Tensor, t: Tensor, text: Text) -> Tensor:
        output = self.pipe.unet(latents.to(self.dtype), t, encoder_hidden_states=text.hidden.to(self.dtype)).sample
        return output.to(latents.dtype)

    def to_x0(self, output: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.signal_and_noise(t)
        return (latents - sigma * output) / alpha if self.prediction_type == "epsilon" else alpha * latents - sigma * output

    def to_eps(self, output: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.signal_and_noise(t)
        return output if self.prediction_type == "epsilon" else alpha * output + sigma * latents

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.signal_and_noise(t)
        return noise if self.prediction_type == "epsilon" else alpha * noise - sigma * x0

    def scheduler(self, steps: int, latent_shape: tuple[int, int, int] | None = None) -> DPMSolverMultistepScheduler:
        config = {**self.pipe.scheduler.config, "algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
        # "leading" is what other schedulers do unless told, and begins below the noisiest step. diffusers replaces it by this
        # solver's "linspace" as long as it is unspoken; a saved model speaks it out, and has to draw the same images.
        if config["timestep_spacing"] == "leading":
            config["timestep_spacing"] = "linspace"
        scheduler: Any = DPMSolverMultistepScheduler.from_config(config)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    # --- other people's formats ---------------------------------------------------------------------------------
    def kohya_lora_keys(self, site: str) -> list[str]:
        component, _, path = site.partition(".")
        # diffusers' own converter writes our path for text encoders, without the prefix that the other tools look for
        paths = dict.fromkeys((self.diffusers_lora_key(site).partition(".")[2], path))
        return [f"{self.kohya_parts[component]}_{path.replace('.', '_')}" for path in paths]

    def kohya_lora_header(self) -> dict[str, str]:
        velocity = self.prediction_type == "v_prediction"
        is_v2 = self.pipe.unet.config.cross_attention_dim == V2_TEXT_WIDTH
        name = ("stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512") if is_v2 else "stable-diffusion-v1"
        return {
            "modelspec.architecture": f"{name}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.resolution": f"{self.image_size}x{self.image_size}",
            "modelspec.prediction_type": "v" if velocity else "epsilon",
            "ss_base_model_version": f"sd_v{2 if is_v2 else 1}{'_v' if velocity else ''}",
            "ss_v2": str(is_v2),
        }


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE over a vocabulary of single bytes and a few whole words; BOS and EOT have the highest ids."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = [*alphabet, *(f"{byte}</w>" for byte in alphabet)]
    merges: list[Any] = []
    for word in ("photo", "picture"):
        spelled = word[0]
        for letter in [*word[1:-1], f"{word[-1]}</w>"]:
            merges.append((spelled, letter))
            spelled += letter
    vocabulary += dict.fromkeys(map("".join, merges))
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, list(dict.fromkeys(merges)), model_max_length=77)


def tiny_text_config(tokenizer: CLIPTokenizer, **sizes: Any) -> CLIPTextConfig:
    """For a text encoder that reads this tokenizer's words."""
    special: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, **sizes, **special)
