"""Stable Diffusion 1 and 2: a UNet that reads one CLIP text encoder through cross-attention."""

from __future__ import annotations

import copy
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
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toolkit.arch.base import Architecture, Text, from_pretrained
from toolkit.errors import UserError
from toolkit.io.files import replacing_folder

LORA_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
V2_TEXT_WIDTH = 1024  # of the text encoder of Stable Diffusion 2; that of 1 has 768
TEXT_PREFIX = "text_model."  # part of the names in checkpoints; transformers >= 5.6 leaves it out of its module names

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


class SD(Architecture):
    """StableDiffusionPipeline, with noise (epsilon) or velocity (v) prediction as the scheduler's configuration says."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline",)
    kohya_parts: ClassVar[dict[str, str]] = {"denoiser": "lora_unet", "text_encoder": "lora_te"}

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        pipe.set_progress_bar_config(disable=True)
        noising: Any = DDPMScheduler.from_config(pipe.scheduler.config)
        self.prediction_type: str = noising.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"the model predicts {self.prediction_type!r}, need epsilon or v_prediction; check its scheduler_config.json")
        self.alphas_cumprod: Tensor = noising.alphas_cumprod  # alpha_t^2, [train_timesteps]
        self.train_timesteps: int = noising.config.num_train_timesteps
        self.downscale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self.image_size: int = pipe.unet.config.sample_size * self.downscale
        for module in self.components().values():
            module.eval().requires_grad_(False)

    # --- making one ---------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, source: str, *, dtype: torch.dtype) -> Self:
        return cls(from_pretrained(StableDiffusionPipeline, source, dtype, safety_checker=None, requires_safety_checker=False))

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

    def save(self, folder: Path) -> Path:
        with replacing_folder(folder, marker="model_index.json") as temporary:
            self.pipe.save_pretrained(temporary)
            for name, embedding in self.token_embeddings().items():
                weights = temporary / name / "model.safetensors"
                state = {_prefixed(key): value for key, value in load_file(weights).items()}
                save_file(state, weights, {"format": "pt"})
                config = copy.deepcopy(self.components()[name].config)
                config.vocab_size = embedding.num_embeddings  # the words of attached tokens are rows too
                config.save_pretrained(temporary / name)
        return folder

    # --- parts --------------------------------------------------------------------------------------------------
    def components(self) -> dict[str, nn.Module]:
        return {"denoiser": self.pipe.unet, "text_encoder": self.pipe.text_encoder, "vae": self.pipe.vae}

    def text_linears(self) -> dict[str, nn.Linear]:
        return self._denoiser_linears("attn2.to_k", "attn2.to_v")

    def lora_targets(self) -> dict[str, nn.Linear]:
        return self._denoiser_linears(*(f"{attention}.{linear}" for attention in ("attn1", "attn2") for linear in LORA_PROJECTIONS))

    def _denoiser_linears(self, *endings: str) -> dict[str, nn.Linear]:
        modules = self.pipe.unet.named_modules()
        return {f"denoiser.{name}": module for name, module in modules if name.endswith(endings) and isinstance(module, nn.Linear)}

    def attention_sites(self) -> dict[str, nn.Module]:
        return {f"denoiser.{name}": module for name, module in self.pipe.unet.named_modules() if name.endswith(("attn1", "attn2"))}

    def token_embeddings(self) -> dict[str, nn.Embedding]:
        return {"text_encoder": self.pipe.text_encoder.get_input_embeddings()}

    def set_token_embedding(self, component: str, module: nn.Module) -> None:
        self.pipe.text_encoder.set_input_embeddings(module)

    def tokenizers(self) -> dict[str, Any]:
        return {"text_encoder": self.pipe.tokenizer}

    def set_tokenizer(self, component: str, tokenizer: Any) -> None:
        self.pipe.tokenizer = tokenizer

    # --- text ---------------------------------------------------------------------------------------------------
    def encode(self, prompts: Sequence[str], *, grad: bool = False) -> Text:
        encoder = self.pipe.text_encoder
        ids, length = self.tokenize(prompts, "text_encoder")
        with torch.set_grad_enabled(grad):
            hidden = encoder(ids).last_hidden_state
        return Text(hidden, ids, length)

    def tokenize(self, prompts: Sequence[str], component: str) -> tuple[Tensor, Tensor]:
        """Token ids [n, L] for a text encoder, on its device, and the number of tokens up to and including EOT [n]."""
        tokenizer, encoder = self.tokenizers()[component], self.components()[component]
        longest = encoder.config.max_position_embeddings
        # A token of several vectors is several words. It is found by its exact spelling; the tokenizer lower-cases anyway.
        words = self.pipe.maybe_convert_prompt([prompt.lower() for prompt in prompts], tokenizer)
        tokens = tokenizer(words, padding="max_length", max_length=longest, truncation=False, verbose=False)
        for prompt, ids in zip(prompts, tokens.input_ids, strict=True):
            if len(ids) > longest:
                raise UserError(f"prompt {prompt!r} has {len(ids) - 2} tokens, {longest - 2} fit; shorten it")
        device = encoder.device
        return torch.tensor(tokens.input_ids, device=device), torch.tensor(tokens.attention_mask, device=device).sum(1)

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

    def predict(self, latents: Tensor, t: Tensor, text: Text) -> Tensor:
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

    def scheduler(self, steps: int) -> DPMSolverMultistepScheduler:
        config = {**self.pipe.scheduler.config, "algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
        # "leading" is what other schedulers do unless told, and begins below the noisiest step. diffusers replaces it by this
        # solver's "linspace" as long as it is unspoken; a saved model speaks it out, and has to draw the same images.
        if config["timestep_spacing"] == "leading":
            config["timestep_spacing"] = "linspace"
        scheduler: Any = DPMSolverMultistepScheduler.from_config(config)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    # --- other people's formats ---------------------------------------------------------------------------------
    def diffusers_lora_key(self, site: str) -> str:
        component, _, path = site.partition(".")
        return f"unet.{path}" if component == "denoiser" else f"{component}.{_prefixed(path)}"

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


def _prefixed(key: str) -> str:
    """The name of a text encoder's parameter or module as it is in checkpoints."""
    return key if key.startswith((TEXT_PREFIX, "text_projection")) else TEXT_PREFIX + key


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
