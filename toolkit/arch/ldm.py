"""Where a checkpoint in one file keeps each parameter: the names of CompVis' latent-diffusion and Stability's generative-models.

Such a file holds the UNet below "model.diffusion_model.", the image decoder below "first_stage_model." and the text encoders
below "cond_stage_model." or "conditioner.embedders.", an OpenAI CLIP as transformers names it, an OpenCLIP as open_clip does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.errors import UserError

OPEN_CLIP = ".model."  # how the prefix of an OpenCLIP text encoder ends

UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


@dataclass(frozen=True)
class Slot:
    """Where a parameter is stored. view: what of the tensor called `key` it is; writing into the view writes the tensor."""

    key: str
    view: Callable[[Tensor], Tensor] = lambda stored: stored


@dataclass(frozen=True)
class Layout:
    """One version of a model in one file.

    prefixes: component -> what its keys begin with. configs: the folder with the configurations of its parts, as diffusers
    has them.
    """

    prefixes: Mapping[str, str]
    configs: Path

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of the pipeline's part of this name."""
        return json.loads((self.configs / part / "config.json").read_text(encoding="utf-8"))

    def slots(self, names: Iterable[str]) -> dict[str, Slot]:
        """The slots of these parameters, by name. One that the layout has no place for is a UserError."""
        unet, vae = self.config("unet"), self.config("vae")
        found = {}
        for name in names:
            try:
                found[name] = self._slot(name, unet, vae)
            except LookupError:
                what = f"edit changes {name}, which no single file of a {self.configs.name} model has"
                raise UserError(f"{what}; apply it to a model like the one it was fitted on") from None
        return found

    def _slot(self, name: str, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Slot:
        component, _, path = name.partition(".")
        prefix = self.prefixes[component]
        if component == "denoiser":
            return Slot(prefix + unet_key(path, unet))
        if component == "vae":
            return _vae(prefix, path, len(vae["up_block_types"]))
        path = path.removeprefix("text_model.")
        return _open_clip(prefix, path) if prefix.endswith(OPEN_CLIP) else Slot(f"{prefix}text_model.{path}")


def unet_key(path: str, config: Mapping[str, Any]) -> str:
    """What a UNet's parameter is called there, without the prefix. config: the UNet's.

    Blocks are numbered through, each layer with its attention, then a downsampler; an upsampler is in the last layer.
    """
    layers = config["layers_per_block"] + 1
    match path.split("."):
        case ["down_blocks", block, "downsamplers", _, _, kind]:
            return f"input_blocks.{layers * (int(block) + 1)}.0.op.{kind}"
        case ["down_blocks", block, what, layer, *rest]:
            return f"input_blocks.{layers * int(block) + int(layer) + 1}.{int(what == 'attentions')}.{_unet_layer(what, rest)}"
        case ["mid_block", what, layer, *rest]:
            return f"middle_block.{2 * int(layer) + (what == 'attentions')}.{_unet_layer(what, rest)}"
        case ["up_blocks", block, "upsamplers", _, _, kind]:
            attends = config["up_block_types"][int(block)].startswith("CrossAttn")
            return f"output_blocks.{layers * (int(block) + 1) - 1}.{1 + attends}.conv.{kind}"
        case ["up_blocks", block, what, layer, *rest]:
            return f"output_blocks.{layers * int(block) + int(layer)}.{int(what == 'attentions')}.{_unet_layer(what, rest)}"
    module, _, kind = path.rpartition(".")
    return f"{UNET[module]}.{kind}"


def _unet_layer(what: str, rest: list[str]) -> str:
    return ".".join(rest if what == "attentions" else [UNET_RESNET[rest[0]], *rest[1:]])


def _vae(prefix: str, path: str, blocks: int) -> Slot:
    """The decoder's blocks are counted from the image inwards; attention is stored as convolutions of one pixel."""
    match path.split("."):
        case [side, "mid_block", "attentions", _, *module, kind]:
            key = f"{prefix}{side}.mid.attn_1.{VAE_ATTENTION['.'.join(module)]}.{kind}"
            return Slot(key, lambda stored: stored.flatten(1)) if kind == "weight" and module != ["group_norm"] else Slot(key)
        case [side, "mid_block", "resnets", layer, *rest]:
            key = f"{side}.mid.block_{int(layer) + 1}.{'.'.join(rest)}"
        case [side, "down_blocks", block, what, layer, *rest]:
            key = f"{side}.down.{block}.{_vae_layer(what, layer, rest)}"
        case [side, "up_blocks", block, what, layer, *rest]:
            key = f"{side}.up.{blocks - 1 - int(block)}.{_vae_layer(what, layer, rest)}"
        case _:
            key = path.replace("conv_norm_out", "norm_out")
    return Slot(prefix + key)


def _vae_layer(what: str, layer: str, rest: list[str]) -> str:
    inner = ".".join(rest).replace("conv_shortcut", "nin_shortcut")
    return f"block.{layer}.{inner}" if what == "resnets" else f"{what.removesuffix('rs')}.{inner}"


def _open_clip(prefix: str, path: str) -> Slot:
    """Queries, keys and values are stored as one tensor, one after another; the projection is stored transposed."""
    match path.split("."):
        case ["text_projection", "weight"]:
            return Slot(f"{prefix}text_projection", lambda stored: stored.T)
        case ["encoder", "layers", layer, "self_attn", ("q_proj" | "k_proj" | "v_proj") as which, kind]:
            part = ("q_proj", "k_proj", "v_proj").index(which)
            return Slot(f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}", lambda stored: stored.chunk(3)[part])
        case ["encoder", "layers", layer, *module, kind]:
            return Slot(f"{prefix}transformer.resblocks.{layer}.{OPEN_CLIP_LAYER['.'.join(module)]}.{kind}")
    return Slot(prefix + OPEN_CLIP_TOP[path])
