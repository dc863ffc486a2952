"""What an architecture offers to the rest of the toolkit: the same few verbs for every model family.

Names. A *component* is one of "denoiser", "text_encoder", "text_encoder_2", "vae", ...; a *parameter name* is
"<component>.<path>.weight" and a *site* is the same without the ".weight" of a linear layer, e.g.
"denoiser.mid_block.attentions.0.transformer_blocks.0.attn2.to_k".
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from toolkit.errors import UserError


@dataclass(frozen=True)
class Text:
    """Encoded prompts.

    hidden [n, L, d]: what the denoiser reads. ids [n, L]: token ids. length [n]: tokens up to and including EOT
    (so the last subject token of a prompt is at `length - 2`). pooled [n, p] or None.
    """

    hidden: Tensor
    ids: Tensor
    length: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: Any) -> Text:
        """Rows of the batch; index is anything that indexes a tensor's first axis and keeps it."""
        pooled = None if self.pooled is None else self.pooled[index]
        return Text(self.hidden[index], self.ids[index], self.length[index], pooled)

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        """Batches one after another."""
        pooled = None if parts[0].pooled is None else torch.cat([p.pooled for p in parts if p.pooled is not None])
        hidden, ids = torch.cat([p.hidden for p in parts]), torch.cat([p.ids for p in parts])
        return Text(hidden, ids, torch.cat([p.length for p in parts]), pooled)


class Architecture(ABC):
    """One loaded model of one family. Everything that says how the family is built is in its subclass.

    pipe: the diffusers pipeline that holds the components.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]  # the diffusers pipeline classes of this family, as model_index.json names them

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    # --- making one ---------------------------------------------------------------------------------------------
    @classmethod
    @abstractmethod
    def load(cls, source: str, *, dtype: torch.dtype) -> Self:
        """From a diffusers folder or a hub id, in evaluation mode, no gradients, on the CPU."""

    @classmethod
    @abstractmethod
    def tiny(cls, *, seed: int = 0, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon") -> Self:
        """A random instance of the real classes, small enough for a test (well under a second to build)."""

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write a diffusers folder with the names that other people's tools read.

        The folder is replaced as a whole when it holds a model already; one that holds something else is a UserError.
        """

    def copy(self) -> Self:
        """An independent instance. The image decoder, which nobody changes, the tokenizers and the scheduler are shared."""
        twin = copy.copy(self)
        twin.pipe = copy.copy(self.pipe)
        shared = self.components().get("vae")
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module) and part is not shared:
                setattr(twin.pipe, name, copy.deepcopy(part))
        return twin

    # --- parts --------------------------------------------------------------------------------------------------
    @abstractmethod
    def components(self) -> dict[str, nn.Module]:
        """The neural parts by component name."""

    @abstractmethod
    def text_linears(self) -> dict[str, nn.Linear]:
        """Site -> linear layer, for the layers that read the text encoder's output as it is (no bias)."""

    @abstractmethod
    def lora_targets(self) -> dict[str, nn.Linear]:
        """Site -> linear layer, for the layers that low-rank training usually adapts (attention projections)."""

    @abstractmethod
    def attention_sites(self) -> dict[str, nn.Module]:
        """Site -> attention module, cross- and self-attention alike."""

    @abstractmethod
    def token_embeddings(self) -> dict[str, nn.Embedding]:
        """Component -> token embedding of each text encoder."""

    @abstractmethod
    def set_token_embedding(self, component: str, module: nn.Module) -> None:
        """Put another embedding module in place (token edits and token training do, and put the old one back)."""

    @abstractmethod
    def tokenizers(self) -> dict[str, Any]:
        """Component -> tokenizer of each text encoder."""

    @abstractmethod
    def set_tokenizer(self, component: str, tokenizer: Any) -> None:
        """Put another tokenizer in place."""

    # --- text ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def encode(self, prompts: Sequence[str], *, grad: bool = False) -> Text:
        """Encode prompts, padded to the family's length. grad=True keeps the graph back to embeddings and weights."""

    def encode_negative(self, prompts: Sequence[str]) -> Text:
        """Prompts as the other side of classifier-free guidance; "" is how the family was trained without a prompt."""
        return self.encode(prompts)

    # --- images and noise ---------------------------------------------------------------------------------------
    image_size: int  # default height and width in pixels
    train_timesteps: int

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of the latent of an image of this size in pixels."""

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels [n, 3, h, w] in [-1, 1] -> scaled latents [n, c, h', w'] (the posterior's mean)."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pixels [n, 3, h, w] in [-1, 1]."""

    @abstractmethod
    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each [n, 1, 1, 1], such that x_t = alpha_t x_0 + sigma_t eps. t: timesteps [n]."""

    @abstractmethod
    def predict(self, latents: Tensor, t: Tensor, text: Text) -> Tensor:
        """The denoiser's own output for noisy latents [n, c, h', w'] at timesteps t [n]."""

    @abstractmethod
    def to_x0(self, output: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a denoiser output implies."""

    @abstractmethod
    def to_eps(self, output: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """The noise that a denoiser output implies."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should output for x_t = add_noise(x0, noise, t)."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self.signal_and_noise(t)
        return alpha * x0 + sigma * noise

    @abstractmethod
    def scheduler(self, steps: int) -> Any:
        """A fresh deterministic diffusers scheduler with its timesteps set; the default sampler of the family."""

    # --- other people's formats ---------------------------------------------------------------------------------
    @abstractmethod
    def diffusers_lora_key(self, site: str) -> str:
        """The key prefix that diffusers' load_lora_weights reads for a site, e.g. "unet.mid_block....to_k"."""

    @abstractmethod
    def kohya_lora_keys(self, site: str) -> list[str]:
        """The key prefixes that LoRA files of Kohya's tools have for a site, e.g. "lora_unet_mid_block_..._to_k".

        The first is the one to write: sd-scripts, ComfyUI, A1111 and diffusers all read it. The others occur in files.
        """

    @abstractmethod
    def kohya_lora_header(self) -> dict[str, str]:
        """What the header of such a file says about the base model, in the terms of modelspec 1.0.1 and of sd-scripts."""

    @property
    def device(self) -> torch.device:
        """Where inputs go: where the parts are, or the accelerator that offloaded parts visit in turn."""
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's parameter type."""
        return next(self.components()["denoiser"].parameters()).dtype


def from_pretrained(pipeline: Any, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """A diffusers pipeline from a folder or a hub id, from safetensors only. Failing to is a UserError."""
    try:
        return pipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load {source!r} ({reason}); give a diffusers folder or hub id with .safetensors weights") from error
