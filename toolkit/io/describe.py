"""What a checkpoint is, as its files say, without loading it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.arch.single_file import prediction_type, recognise
from toolkit.errors import UserError
from toolkit.io.files import HEADER, PICKLES
from toolkit.io.header import read_header
from toolkit.io.stream import hollow, stored_fingerprint

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture
    from toolkit.model import Model

MERGED = "palimpsest-edits.json"  # in a folder that was written with edits merged into it: a list of what they are


@dataclass(frozen=True)
class CheckpointFacts:
    """form: how it is stored. architecture: its family. predicts: what its denoiser gives. bytes: of its safetensors files.

    dtypes: how many numbers are of which type. components: how many parameters each has. fingerprint: see `toolkit.fingerprint`.
    merged: edits that it says are inside. pickles: files that are never read.
    """

    form: str
    architecture: str
    predicts: str
    bytes: int
    dtypes: Mapping[str, int]
    components: Mapping[str, int]
    fingerprint: Mapping[str, str]
    merged: tuple[Mapping[str, Any], ...] = ()
    pickles: tuple[str, ...] = ()


def on_disk(source: Path) -> CheckpointFacts:
    """Of a diffusers folder or a .safetensors file. One that is no whole model is a UserError."""
    arch = hollow(source)
    files = sorted(source.rglob("*.safetensors")) if source.is_dir() else [source]
    dtypes: dict[str, int] = {}
    for file in files:
        for tensor in read_header(file).tensors.values():
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return CheckpointFacts(
        "a diffusers folder" if source.is_dir() else "one file",
        arch.name,
        _predicts(source),
        sum(file.stat().st_size for file in files),
        dtypes,
        _parameters(arch),
        stored_fingerprint(source, arch),
        _merged(source),
        tuple(str(file.relative_to(source)) for file in _pickles(source)),
    )


def in_memory(model: Model) -> CheckpointFacts:
    """Of a loaded model without edits, which may come from a hub."""
    dtypes: dict[str, int] = {}
    size = 0
    for module in model.arch.components().values():
        for parameter in module.parameters():
            name = str(parameter.dtype).removeprefix("torch.")
            dtypes[name] = dtypes.get(name, 0) + parameter.numel()
            size += parameter.numel() * parameter.element_size()
    predicts = getattr(model.arch, "prediction_type", "flow")
    return CheckpointFacts("in memory", model.arch.name, predicts, size, dtypes, _parameters(model.arch), model.fingerprint)


def fitted_on(file: Path) -> tuple[str, Mapping[str, str]]:
    """The method of an edit file and the fingerprint of the model that it was fitted on; empty where it does not say."""
    header = read_header(file).metadata.get(HEADER)
    if header is None:
        return "", {}
    try:
        info: dict[str, Any] = json.loads(header)["info"]
        own: list[dict[str, Any]] = [info, *(part.get("info", part) for part in info.get("notes", {}).get("parts", ()))]
        return ", ".join(str(one["method"]) for one in own if one.get("method")), next((one["base"] for one in own if one.get("base")), {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file.name} has a damaged header ({error}); fit or download it again") from None


def _parameters(arch: Architecture) -> dict[str, int]:
    return {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in arch.components().items()}


def _predicts(source: Path) -> str:
    if source.is_dir():
        config = source / "scheduler" / "scheduler_config.json"
        held: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        return str(held.get("prediction_type", "flow" if "shift" in held else "not said"))
    found = recognise(source)
    try:
        return prediction_type(str(source), found.layout.configs.name, found.header)
    except UserError:
        return "not said"


def _merged(source: Path) -> tuple[Mapping[str, Any], ...]:
    path = source / MERGED
    return tuple(json.loads(path.read_text(encoding="utf-8"))) if source.is_dir() and path.is_file() else ()


def _pickles(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.suffix in PICKLES) if source.is_dir() else []
