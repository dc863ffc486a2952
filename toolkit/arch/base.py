"""What an architecture offers to the rest of the toolkit: the same few verbs for every model family.

Names. A *component* is one of "denoiser", "text_encoder", "text_encoder_2", "vae", ...; a *parameter name* is
"<component>.<path>.weight" and a *site* is the same without the ".weight" of a linear layer, e.g.
"denoiser.mid_block.attentions.0.transformer_blocks.0.attn2.to_k".
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from toolkit.arch.text import Segment, Stream, Text
from toolkit.errors import UserError

OFFLOADED = ("_hf_hook", "_diffusers_hook")  # what accelerate and diffusers leave at a part that moves while it is in use


class Architecture(ABC):
    """One loaded model of one family. Everything that says how the family is built is in its subclass.

    pipe: the diffusers pipeline that holds the components.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]  # the diffusers pipeline classes of this family, as model_index.json names them
    single_files: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """What one file of it may be: version (a folder in toolkit/arch/configs) -> component -> what its keys begin with."""
    default_guidance: float = 5.0  # guidance scale when none is given
    distilled_guidance: bool = False  # whether the denoiser reads the scale itself (`Text.guidance`) and needs no second prediction
    unread: Callable[[str], Tensor] | None = None
    """Gives the values, in the type that they are stored in, of a parameter that was left in its file and is on the meta device
    here; None when all parameters are loaded."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.readers: list[Callable[[Text], object]] = []  # are given the encoded prompts of each prediction before it is made

    # --- making one ---------------------------------------------------------------------------------------------
    @classmethod
    @abstractmethod
    def load(cls, source: str, *, dtype: torch.dtype, **parts: Any) -> Self:
        """From a diffusers folder, a hub id or one file, in evaluation mode, no gradients, on the CPU.

        parts: those of the pipeline that are here already, and are not loaded.
        """

    @classmethod
    @abstractmethod
    def load_text(cls, source: str, configs: Path, *, dtype: torch.dtype) -> Self:
        """The same, with the denoiser and the image decoder left where they are: their parameters are on the meta device.

        configs: as in `hollow`.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, *, seed: int = 0) -> Self:
        """A random instance of the real classes, small enough for a test (well under a second to build)."""

    @classmethod
    def hollow(cls, configs: Path) -> Self:
        """An instance that knows the names and shapes of its components' parameters, and nothing else.

        configs: a diffusers folder; its weights are not read.
        """
        index: dict[str, Any] = json.loads((configs / "model_index.json").read_text(encoding="utf-8"))
        arch, parts = cls.__new__(cls), {}
        for name, kind in index.items():
            if not isinstance(kind, list) or kind[0] not in ("diffusers", "transformers"):
                continue
            made: Any = getattr(import_module(kind[0]), kind[1])
            by_transformers, by_diffusers = issubclass(made, PreTrainedModel), issubclass(made, ModelMixin)
            with torch.device("meta"):
                if by_transformers:
                    parts[name] = made(made.config_class.from_pretrained(configs / name))
                elif by_diffusers:
                    parts[name] = made.from_config(made.load_config(configs / name))
        arch.pipe = SimpleNamespace(**parts)
        return arch

    @classmethod
    def around(cls, pipe: Any) -> Self:
        """An instance around a pipeline that somebody else runs, of which nothing is changed.

        It knows parts, layers and words, which is enough for edits, and nothing about noise and images.
        """
        arch = cls.__new__(cls)
        arch.pipe, arch.readers = pipe, []
        return arch

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write a diffusers folder with the names that other people's tools read.

        The folder is replaced as a whole when it holds a model already; one that holds something else is a UserError.
        """

    def copy(self) -> Self:
        """An independent instance. The image decoder, which nobody changes, the tokenizers and the scheduler are shared."""
        twin = copy.copy(self)
        twin.pipe, twin.readers = copy.copy(self.pipe), []
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
        """Site -> linear layer, for the layers that read the text encoders' output as it is: those of all `text_streams`."""

    def value_linears(self) -> dict[str, nn.Linear]:
        """Those of `text_linears` that give attention its values and not its keys; all, where one layer gives both."""
        return self.text_linears()

    def text_streams(self) -> dict[str, Stream]:
        """Name -> stream, for what the denoiser reads of the text encoders. Layers of one stream read the same rows, so that
        one change of the rows does for all. Default: the hidden state, read by all `text_linears`."""
        return {"hidden": Stream(self.text_linears(), lambda text: (Segment(text.hidden, text.ids, text.length),))}

    def text_readers(self) -> dict[str, dict[str, nn.Linear]]:
        """Name -> (site -> linear layer), for the layers that read what earlier ones have made of the text's rows.

        Layers of one name read the same rows [n, L, d]: those of the stream "hidden" in its order, and after them, in some, the
        image's. They depend on the image and the timestep. A bias is no part of what an edit changes. Default: none.
        """
        return {}

    def encoder_readers(self) -> dict[str, dict[str, nn.Linear]]:
        """Name -> (site -> linear layer), for projections in the text encoders: the keys and values of each attention, and that of
        a pooled encoding. Layers of one name read the same: rows [n, L, d] of one encoder's tokens, or one row for each prompt
        [n, d]. Layers that nothing reads are left out. Default: none.
        """
        return {}

    def encoder_mlps_and_last_attention(self) -> list[str]:
        """Names of the text encoders' parameters in the MLPs of every layer that is read, and in the self-attention of the last such
        layer of each encoder. Default: none."""
        return []

    def encoder_parameters(self, layers: int | None = None) -> list[str]:
        """Names of the text encoders' parameters that are read, without the embeddings: of the first so many layers of each encoder,
        or of all with what follows them. More than there are is a UserError. Default: none."""
        return []

    @abstractmethod
    def lora_targets(self) -> dict[str, nn.Linear]:
        """Site -> linear layer, for the denoiser's layers that low-rank training usually adapts (attention projections)."""

    def denoiser_layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Site -> layer, for all linear layers and convolutions of the denoiser."""
        modules = self.components()["denoiser"].named_modules()
        return {f"denoiser.{name}": module for name, module in modules if isinstance(module, nn.Linear | nn.Conv2d)}

    def encoder_lora_targets(self) -> dict[str, nn.Linear]:
        """The same for the text encoders, as far as their layers are read. Default: none."""
        return {}

    @abstractmethod
    def attention_sites(self) -> dict[str, nn.Module]:
        """Site -> attention module, cross- and self-attention alike."""

    def attention_width(self, site: str) -> int:
        """Width d of the image's output [n, tokens, d] of one of `attention_sites`."""
        attention: Any = self.attention_sites()[site]
        return attention.out_dim

    def cross_attention_sites(self) -> dict[str, nn.Module]:
        """Those of `attention_sites` in which the image reads the text and nothing else. Default: those with some of `text_linears`."""
        with_text = {site.rpartition(".")[0] for site in self.text_linears()}
        return {site: module for site, module in self.attention_sites().items() if site in with_text}

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

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of this name. One that was left in its file is read, and is in memory from then on."""
        component, _, path = name.partition(".")
        owner, _, own = path.rpartition(".")
        module = self.components()[component].get_submodule(owner)
        held = dict(module.named_parameters(recurse=False)).get(own)
        if self.unread and held is not None and held.is_meta:
            setattr(module, own, nn.Parameter(self.unread(name).to(self.device, held.dtype), requires_grad=False))
        return module.get_parameter(own)

    # --- text ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def encode(self, prompts: Sequence[str], *, grad: bool = False) -> Text:
        """Encode prompts, padded to the family's length. grad=True keeps the graph back to embeddings and weights."""

    def encode_again(self, text: Text, *, grad: bool = False) -> Text:
        """What `encode` gives for the prompts of an encoded text, by its token ids, with the encoders as they are by now.

        For families with `cross_attention_sites`.
        """
        raise NotImplementedError(f"{self.name} encodes prompts, and not token ids")

    def encode_negative(self, prompts: Sequence[str]) -> Text:
        """Prompts as the other side of classifier-free guidance; "" is how the family was trained without a prompt."""
        return self.encode(prompts)

    # --- images and noise ---------------------------------------------------------------------------------------
    image_size: int  # default height and width in pixels
    downscale: int  # pixels of an image's side for one of its latent's
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
        """(alpha_t, sigma_t), each [n, 1, 1, 1], such that x_t = alpha_t x_0 + sigma_t eps.

        t: timesteps [n], integers below `train_timesteps` or what `scheduler` gives.
        """

    def predict(self, latents: Tensor, t: Tensor, text: Text) -> Tensor:
        """The denoiser's own output for noisy latents [n, c, h', w'] at timesteps t [n]."""
        for reader in self.readers:
            reader(text)
        return self._predict(latents, t, text)

    @abstractmethod
    def _predict(self, latents: Tensor, t: Tensor, text: Text) -> Tensor:
        """What `predict` gives."""

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
    def scheduler(self, steps: int, latent_shape: tuple[int, int, int] | None = None) -> Any:
        """A fresh deterministic diffusers scheduler with its timesteps set; the default sampler of the family.

        It starts from standard normal noise, and the denoiser reads its latents as they are. latent_shape: of one
        latent, None is that of the default size; some families take noisier steps for larger images.
        """

    # --- other people's formats ---------------------------------------------------------------------------------
    @abstractmethod
    def diffusers_lora_key(self, site: str) -> str:
        """What diffusers calls a site or parameter: the part's folder, then the key there, e.g. "unet.mid_block....to_k".

        So it is named in LoRA files for load_lora_weights, and in the checkpoints of a diffusers folder.
        """

    def kohya_lora_keys(self, site: str) -> list[str]:
        """The key prefixes that LoRA files of Kohya's tools have for a site, e.g. "lora_unet_mid_block_..._to_k".

        The first is the one to write: sd-scripts, ComfyUI, A1111 and diffusers all read it. The others occur in files. None
        is the default: such files are neither written nor read for this family.
        """
        return []

    def kohya_lora_header(self) -> dict[str, str]:
        """What the header of such a file says about the base model, in the terms of modelspec 1.0.1 and of sd-scripts."""
        return {}

    @property
    def device(self) -> torch.device:
        """Where inputs go: where the parts are, or the accelerator that offloaded parts visit in turn."""
        parts = self.components().values()
        if self.unread:  # the parts that are left in their files are nowhere
            return next(value.device for part in parts for value in part.parameters() if not value.is_meta)
        places = {next(part.parameters()).device for part in parts}
        if len(places) == 1 and not any(hasattr(part, hook) for part in parts for hook in OFFLOADED):
            (place,) = places
            if place.type != "meta":
                return place  # diffusers' answer asks every module, which took 8 % of a small model's training step
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's parameter type."""
        return next(self.components()["denoiser"].parameters()).dtype


def from_pretrained(pipeline: Any, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """A diffusers pipeline from a folder or a hub id, from safetensors only. Failing to is a UserError."""
    try:
        missing = {name: None for name, kind in pipeline.load_config(source).items() if kind == [None, None]}  # saved without these
        return pipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **{**missing, **options})
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load {source!r} ({reason}); give a diffusers folder or hub id with .safetensors weights") from error
