"""LoRA files and textual-inversion embeddings that other tools wrote, read as edits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils.state_dict_utils import StateDictType, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from toolkit.arch.base import Architecture
from toolkit.edits.base import Edit, EditInfo, frozen
from toolkit.edits.low_rank import WEIGHT_NDIMS, LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.export import FLUX_ROW_NAMES, ROW_NAMES
from toolkit.model import Model

REFUSED = {  # part of a tensor's name -> the kind of adapter that has it
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".lora_mid": "LoCon with Tucker decomposition",
    ".oft_": "OFT",
}
ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "alpha": "alpha",
}
LORA = re.compile(r".+[._]lora[._].+\.weight")
TENSOR = re.compile(rf"(.+)\.({'|'.join(map(re.escape, ROLES))})")
NUMBERED = re.compile(r"\w+:\d+:(up|down)")
COMPONENTS = {name: component for component, name in ROW_NAMES.items()}
FLUX_COMPONENTS = {name: component for component, name in FLUX_ROW_NAMES.items()}
NAMELESS = "emb_params"  # what A1111 calls the rows when the file's name is the token


@dataclass(frozen=True)
class Layer:
    """One layer of a LoRA: W -> W + scale * up @ down."""

    up: Tensor
    down: Tensor
    scale: float


def read_adapter(path: str, metadata: Mapping[str, str], tensors: dict[str, Tensor], model: Model | Callable[[], Model] | None) -> Edit:
    """The edit that the tensors of another tool's file are.

    An embedding in diffusers' form (one tensor, named like its token), A1111's (the file is named like it) or SDXL's (two
    tensors, the file is named like the token): a TokenEdit. A LoRA with diffusers' or Kohya's keys: a LowRank with the
    very factors of the file. Anything else is a UserError.

    model: see `load_edit`.
    """
    for mark, kind in REFUSED.items():
        if any(mark in key for key in tensors):
            advice = "merge it into its model with the tool that wrote it, or give a plain LoRA"
            raise UserError(f"{path!r} is a {kind} file, which is not supported; {advice}")
    if any(map(NUMBERED.fullmatch, tensors)):
        what = f"{path!r} is a LoRA that numbers its layers, and does not say which they are"
        raise UserError(f"{what}; convert it to diffusers' or Kohya's names with the tool that wrote it")
    if any(map(LORA.fullmatch, tensors)):
        layers = lora_layers(path, metadata, tensors)
        if model is None:
            raise UserError(f"{path!r} is another tool's LoRA, whose layers are named by the model that it is for; give that --model")
        return _low_rank(path, layers, model if isinstance(model, Model) else model())
    if len(tensors) == 1 or (tensors and tensors.keys() <= COMPONENTS.keys()):
        return _embedding(path, tensors)
    raise UserError(f"{path!r} is a safetensors file but no edit, LoRA or embedding; give one that erase, customize or compose wrote")


def _embedding(path: str, tensors: Mapping[str, Tensor]) -> TokenEdit:
    file = Path(path)
    named = next(iter(tensors)) if len(tensors) == 1 else NAMELESS
    token = file.stem if named in (NAMELESS, *COMPONENTS) else named
    components = FLUX_COMPONENTS if tensors.keys() == FLUX_COMPONENTS.keys() else COMPONENTS
    rows = {components.get(name, "text_encoder"): tensor for name, tensor in tensors.items()}
    word = token.lower()  # as prompts are read
    return TokenEdit.from_rows({word: rows}, EditInfo(triggers=(word,), notes={"file": file.name}))


def lora_layers(path: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """The layers of a LoRA by the names that the file has for them.

    Older keys of diffusers are read as its newer ones. A layer's scale is alpha / rank, where alpha is in the file or in
    the header that diffusers writes, and the rank when it is in neither.
    """
    text = {key: tensor for key, tensor in tensors.items() if key.startswith("text_encoder")}
    rest = {key: tensor for key, tensor in tensors.items() if key not in text}
    state = convert_unet_state_dict_to_peft(rest) | convert_state_dict_to_peft(text, StateDictType.DIFFUSERS_OLD)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = TENSOR.fullmatch(key)
        if not match or tensor.ndim not in ((0, 1) if match[2] == "alpha" else WEIGHT_NDIMS):
            raise UserError(f"{path!r} has a tensor {key!r}, {list(tensor.shape)}, that is no part of a LoRA; give a plain LoRA")
        parts.setdefault(match[1], {})[ROLES[match[2]]] = tensor
    try:
        settings: dict[str, Any] = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path!r} has a damaged header ({error}); download it again") from error
    layers: dict[str, Layer] = {}
    for name, part in parts.items():
        if not {"up", "down"} <= part.keys():
            raise UserError(f"{path!r} has only the {' and '.join(part)} of {name}, needs its up and down factors; download it again")
        rank = len(part["down"])
        alpha = float(part["alpha"]) if "alpha" in part else _alpha(name, settings, rank)
        layers[name] = Layer(part["up"], part["down"], alpha / rank)
    return layers


def _alpha(name: str, settings: Mapping[str, Any], rank: int) -> float:
    """A layer's alpha by the adapter settings in diffusers' header; with rsLoRA, which divides by the root of the rank, made up for."""
    component, _, layer = name.partition(".")
    own: dict[str, float] = settings.get(f"{component}.alpha_pattern") or {}
    common: float = settings.get(f"{component}.lora_alpha", rank)
    alpha = own.get(get_pattern_key([*own], layer), common)
    return alpha * rank**0.5 if settings.get(f"{component}.use_rslora") else alpha


def _low_rank(path: str, layers: Mapping[str, Layer], model: Model) -> LowRank:
    sites = _sites(model.arch)
    if missing := [name for name in layers if name not in sites]:
        what = f"{path!r} changes {len(missing)} layers that {model.source} ({model.arch.name}) does not have, e.g. {missing[0]}"
        raise UserError(f"{what}; give the model that it is for")
    up: dict[str, Tensor] = {}
    down: dict[str, Tensor] = {}
    for name, layer in layers.items():
        site, weight = sites[name]
        if site in up:
            raise UserError(f"{path!r} has {site} under two names, one of them {name}; remove either with the tool that wrote it")
        if len(layer.up) != len(weight) or layer.down[0].numel() != weight[0].numel():
            given, needed = [len(layer.up), *layer.down.shape[1:]], list(weight.shape)
            raise UserError(f"{path!r} changes {name} by {given}, that of {model.source} is {needed}; give the model that it is for")
        # a 1x1 convolution and a linear layer are the same to some tools, so that either has the other's shape in files
        down[site] = frozen(layer.down).view(-1, *weight.shape[1:])
        up[site] = frozen(layer.up if layer.scale == 1.0 else layer.scale * layer.up.float()).flatten(1)
    return LowRank(EditInfo(notes={"file": Path(path).name}), up, down)


def _sites(arch: Architecture) -> dict[str, tuple[str, Tensor]]:
    """Every name that LoRA files have for a layer -> its site and weight."""
    names: dict[str, tuple[str, Tensor]] = {}
    for component in ("denoiser", *arch.token_embeddings()):
        for path, module in arch.components()[component].named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                site = f"{component}.{path}"
                key = arch.diffusers_lora_key(site)
                # diffusers also writes its text encoders' own paths, and used to leave out the denoiser's component
                known = (key, site, *((path,) if component == "denoiser" else ()), *arch.kohya_lora_keys(site))
                names |= dict.fromkeys(known, (site, module.weight))
    return names
