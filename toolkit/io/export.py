"""Edits in the formats that other people's tools load."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from toolkit.arch.base import Architecture
from toolkit.edits.base import Edit
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError, unknown
from toolkit.model import Model
from toolkit.runs import replacing

NOT_IN_NAMES = re.compile(r"[^\w-]+")
LORA_FILE = "pytorch_lora_weights.safetensors"
ROW_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}  # as ComfyUI calls the encoders' rows
FLUX_ROW_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}


def export(edit: Edit, format: str, path: str | Path, model: Model | None = None) -> list[Path]:
    """Write an edit in somebody else's format. Returns what was written.

    format and path: "diffusers-lora": a folder, or a .safetensors file, for `load_lora_weights` at scale 1.
    "embedding": a folder with one file per token, or a .safetensors file for one token, for `load_textual_inversion` and
    A1111. "delta": a .safetensors file of dense changes by diffusers' parameter names. "checkpoint": a diffusers folder.
    model: the model that the edit is for; "embedding" needs none.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    for part, _ in edit.parts():
        if format not in part.exports:
            raise UserError(f"a {part.kind()} edit cannot be written as {format}; export it as {' or '.join(part.exports) or 'nothing'}")
    path = Path(path)
    if model is None and format != "embedding":
        raise UserError(f"{format} needs the model that the edit is for; give --model")
    return FORMATS[format](edit, path, model)


# --- LoRA -----------------------------------------------------------------------------------------------------------
def lora_state(low_rank: LowRank, arch: Architecture) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and the adapter metadata of a LoRA file for diffusers, with alpha = rank everywhere (scale 1)."""
    state: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    for name in low_rank.sites():
        site = name.removesuffix(".weight")
        up, down = low_rank.factors(site)
        key = arch.diffusers_lora_key(site)
        state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = down, up
        module = site.partition(".")[2]  # without a prefix, so that it matches in every version of the loaders
        ranks.setdefault(key.partition(".")[0], {})[module] = len(down)
    metadata: dict[str, object] = {}
    for component, by_module in ranks.items():
        rank = max(by_module.values())
        others = {module: r for module, r in by_module.items() if r != rank}
        settings = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others, "target_modules": [*by_module]}
        metadata |= {f"{component}.{key}": value for key, value in settings.items()}
    return state, metadata


def _diffusers_lora(edit: Edit, path: Path, model: Model) -> list[Path]:
    parts = [(part, scale) for part, scale in edit.parts() if isinstance(part, LowRank)]
    merged = LowRank.merge([part for part, _ in parts], [scale for _, scale in parts])
    state, metadata = lora_state(merged, model.arch)
    file = path if path.suffix == ".safetensors" else path / LORA_FILE
    return [_save(state, file, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True)})]


# --- tokens ---------------------------------------------------------------------------------------------------------
def _embedding(edit: Edit, path: Path, model: Model | None) -> list[Path]:
    tokens = {token: part for part, _ in edit.parts() if isinstance(part, TokenEdit) for token in part.tokens}
    files = {token: path / f"{re.sub(NOT_IN_NAMES, '_', token).strip('_') or 'token'}.safetensors" for token in tokens}
    if path.suffix == ".safetensors":
        if len(tokens) > 1:
            raise UserError(f"{path} is one file for {len(tokens)} tokens; give a folder, each token gets its file there")
        files = dict.fromkeys(tokens, path)
    elif len(set(files.values())) < len(files):
        raise UserError(f"tokens {', '.join(tokens)} would have the same file names; export the edits that they come from one by one")
    written = []
    for token, part in tokens.items():
        rows = part.tokens[token]
        family = part.info.base.get("architecture") or (model.arch.name if model else "")
        names = FLUX_ROW_NAMES if family == "flux" else ROW_NAMES
        # one tensor named like the token: A1111 takes any single tensor, diffusers takes its name for the token
        state = {token: next(iter(rows.values()))} if len(rows) == 1 else {names[name]: row for name, row in rows.items()}
        written.append(_save(state, files[token], {"format": "pt"}))
    return written


# --- weights --------------------------------------------------------------------------------------------------------
def _delta(edit: Edit, path: Path, model: Model) -> list[Path]:
    if path.suffix != ".safetensors":
        path = path / "delta.safetensors"
    state: dict[str, Tensor] = {}
    for name in edit.parameter_names():
        module, _, parameter = name.rpartition(".")
        state[f"{model.arch.diffusers_lora_key(module)}.{parameter}"] = edit.delta(name)
    return [_save(state, path, {"format": "pt"})]


def _checkpoint(edit: Edit, path: Path, model: Model) -> list[Path]:
    if path.suffix == ".safetensors":
        what = f"{str(path)!r} is one file, which is made from a --model in one file alone, in the types that it has"
        raise UserError(f"{what}; give a folder, or such a --model and no --dtype")
    with model.attached(edit):
        return [model.save(path)]


def _save(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, temporary, metadata)
    return path


FORMATS: dict[str, Callable[[Edit, Path, Any], list[Path]]] = {
    "diffusers-lora": _diffusers_lora,
    "embedding": _embedding,
    "delta": _delta,
    "checkpoint": _checkpoint,
}
