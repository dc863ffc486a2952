"""Edits in the formats that other people's tools load."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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
KOHYA_FILE = "lora.safetensors"
LORAS = ("diffusers-lora", "kohya-lora")
WORDS_FOLDER = "embeddings"  # beside a LoRA's file
TEXT_ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".out_proj")  # of a text encoder
ROW_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}  # as ComfyUI calls the encoders' rows
FLUX_ROW_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}


def export(edit: Edit, format: str, path: str | Path, model: Model | None = None) -> list[Path]:
    """Write an edit in somebody else's format. Returns what was written.

    format and path: "diffusers-lora": a folder, or a .safetensors file, for `load_lora_weights` at scale 1.
    "kohya-lora": the same for ComfyUI, A1111 and Kohya's sd-scripts, at strength 1; diffusers reads it too. New words of an edit that
    has both go into a folder "embeddings" beside the LoRA, as "embedding" writes them: A1111 would read them in the LoRA's own file,
    ComfyUI would not, and diffusers refuses such a file. "embedding": a folder with one file per token, or a .safetensors file for one
    token, for `load_textual_inversion`, ComfyUI and A1111. "delta": a .safetensors file of dense changes by diffusers' parameter
    names. "checkpoint": a diffusers folder.
    model: the model that the edit is for; "embedding" needs none.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if missing := _not_written(edit, format):
        others = formats(edit)
        remedy = f"export it as {' or '.join(others)}" if others else "no other tool reads it; attach it when sampling"
        raise UserError(f"a {missing[0].kind()} edit cannot be written as {format}; {remedy}")
    path = Path(path)
    if model is None and format != "embedding":
        raise UserError(f"{format} needs the model that the edit is for; give --model")
    return FORMATS[format](edit, path, model)


def formats(edit: Edit) -> list[str]:
    """The formats that an edit can be written in."""
    return [format for format in FORMATS if not _not_written(edit, format)]


def _not_written(edit: Edit, format: str) -> list[Edit]:
    """The parts of an edit that it cannot be written for in this format."""
    parts = [part for part, _ in edit.parts()]
    with_weights = format in LORAS and not all(isinstance(part, TokenEdit) for part in parts)
    return [part for part in parts if format not in part.exports and not (with_weights and isinstance(part, TokenEdit))]


# --- LoRA -----------------------------------------------------------------------------------------------------------
def lora_state(low_rank: LowRank, arch: Architecture) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and the adapter metadata of a LoRA file for diffusers, with alpha = rank everywhere (scale 1)."""
    state: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    for name in low_rank.sites():
        site = name.removesuffix(".weight")
        up, down = _lora_layer(low_rank, site)
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


def kohya_lora_state(low_rank: LowRank, arch: Architecture) -> dict[str, Tensor]:
    """The tensors of a LoRA file for Kohya's tools.

    alpha is the rank, so that strength 1 is exact. Where layers differ in rank all of a component get its largest as
    alpha, made up for in `lora_up`, because diffusers applies one alpha to all layers.
    """
    factors = {site: _lora_layer(low_rank, site) for site in (name.removesuffix(".weight") for name in low_rank.sites())}
    if not all(map(arch.kohya_lora_keys, factors)):
        raise UserError(f"kohya-lora is not written for {arch.name} models; export it as diffusers-lora, which ComfyUI loads too")
    alphas: dict[str, int] = {}
    for site, (_, down) in factors.items():
        component = site.partition(".")[0]
        alphas[component] = max(alphas.get(component, 0), len(down))
    for site in [site for site in factors if site.endswith(TEXT_ATTENTION)]:
        attention, _, _ = site.rpartition(".")
        up, down = factors[site]
        for name in TEXT_ATTENTION:  # A1111 reads these four together or not at all; diffusers looks for the last one
            factors.setdefault(attention + name, (torch.zeros_like(up[:, :1]), torch.zeros_like(down[:1])))
    state: dict[str, Tensor] = {}
    for site, (up, down) in factors.items():
        key, alpha = arch.kohya_lora_keys(site)[0], alphas[site.partition(".")[0]]
        state[f"{key}.lora_up.weight"] = up * (len(down) / alpha)
        state[f"{key}.lora_down.weight"] = down
        state[f"{key}.alpha"] = torch.tensor(float(alpha))
    return state


def _lora_layer(low_rank: LowRank, site: str) -> tuple[Tensor, Tensor]:
    """(up, down) as modules have them: [out, r] and [r, in], or [out, r, 1, 1] and [r, in, rows, columns]."""
    up, down = low_rank.factors(site)
    return up.view(*up.shape, *[1] * (down.ndim - 2)), down


def _merged(edit: Edit) -> LowRank:
    """The sum of an edit's parts."""
    parts = [(part, scale) for part, scale in edit.parts() if isinstance(part, LowRank)]
    return LowRank.merge([part for part, _ in parts], [scale for _, scale in parts])


def _diffusers_lora(edit: Edit, path: Path, model: Model) -> list[Path]:
    state, metadata = lora_state(_merged(edit), model.arch)
    file = path if path.suffix == ".safetensors" else path / LORA_FILE
    return _save_lora(edit, model, state, file, {"lora_adapter_metadata": json.dumps(metadata, sort_keys=True)})


def _kohya_lora(edit: Edit, path: Path, model: Model) -> list[Path]:
    state = kohya_lora_state(_merged(edit), model.arch)
    file = path if path.suffix == ".safetensors" else path / KOHYA_FILE
    rank = str(max(len(tensor) for name, tensor in state.items() if name.endswith(".lora_down.weight")))
    words = edit.info.triggers
    metadata = {
        **model.arch.kohya_lora_header(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": file.stem,
        **({"modelspec.trigger_phrase": ", ".join(words)} if words else {}),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_output_name": file.stem,
        "ss_tag_frequency": json.dumps({file.stem: dict.fromkeys(words, 1)} if words else {}),
    }
    return _save_lora(edit, model, state, file, metadata)


def _save_lora(edit: Edit, model: Model, state: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> list[Path]:
    """The LoRA, and the edit's new words beside it."""
    words = _embedding(edit, file.parent / WORDS_FOLDER, model)  # first: it may refuse them
    return [_save(state, file, {"format": "pt", **metadata}), *words]


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
    "kohya-lora": _kohya_lora,
    "embedding": _embedding,
    "delta": _delta,
    "checkpoint": _checkpoint,
}
