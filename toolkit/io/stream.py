"""Edits written into checkpoints without loading them: only the touched tensors are read, all else is copied as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from toolkit.arch.ldm import Slot
from toolkit.arch.single_file import recognise
from toolkit.edits.base import Edit, not_mergeable
from toolkit.errors import UserError
from toolkit.io.files import PICKLES, replacing_folder
from toolkit.io.header import Header, Stored, read_header
from toolkit.model import architecture
from toolkit.runs import replacing

INDEX = "model_index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_WEIGHTS = (*PICKLES, ".msgpack", ".h5", ".onnx")
REMEDY = "apply it to a model like the one it was fitted on"


@dataclass(frozen=True)
class Change:
    """What becomes of a parameter: where it is stored, and the parts of the edit with their scales that change it, in order."""

    name: str
    slot: Slot
    edits: list[tuple[Edit, float]]

    def check(self, source: Path, stored: Stored) -> None:
        """Whether the stored tensor can take it."""
        needed = tuple(self.slot.view(torch.empty(stored.shape, device="meta")).shape)
        for edit, _ in self.edits:
            if (given := edit.shape(self.name)) != needed:
                raise UserError(f"edit of {self.name} is {list(given)}, {str(source)!r} has {list(needed)}; {REMEDY}")
        if stored.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(
                f"{self.slot.key} of {str(source)!r} is stored as {stored.dtype}, need {known}; give a checkpoint of such a type"
            )

    @torch.no_grad()
    def apply(self, stored: Tensor) -> None:
        """Change the stored tensor in place: the edits in order, in float32, rounded once to its type."""
        parameter = self.slot.view(stored)
        value = parameter.to(torch.promote_types(stored.dtype, torch.float32))
        for edit, scale in self.edits:
            value = edit.weight(self.name, value, scale)
        parameter.copy_(value)


def write_checkpoint(source: str | Path, edit: Edit, out: str | Path) -> Path:
    """Write a copy of a checkpoint with an edit merged in, as `Model.attach` and saving would. Returns `out`.

    source: a .safetensors file, then `out` is one too; or a diffusers folder, then `out` is one too. They may be the same.
    The copy differs from the source in the values of the tensors that the edit changes, and in nothing else: types, header
    and other files are the same. It takes its place when it is complete; until then, and when this raises, `out` is as it
    was. In memory is one tensor at a time.

    An edit that does not fit, or that is not of weights alone, is a UserError before anything is written.
    """
    source, out = Path(source), Path(out)
    edits: dict[str, list[tuple[Edit, float]]] = {}
    for part, scale in edit.parts():
        if not part.mergeable or not part.parameter_names():
            raise not_mergeable(part)
        for name in part.parameter_names():
            edits.setdefault(name, []).append((part, scale))
    return _write_folder(source, edits, out) if source.is_dir() else _write_file(source, edits, out)


def _write_file(source: Path, edits: Mapping[str, list[tuple[Edit, float]]], out: Path) -> Path:
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"{str(source)!r} is one file, and {str(out)!r} is not one .safetensors file; give such a name")
    found = recognise(source)
    changes = []
    for name, slot in found.layout.slots(edits).items():
        if slot.key not in found.header.tensors:
            raise UserError(f"edit changes {name}, {str(source)!r} has no {slot.key}; {REMEDY}")
        if f"model_ema.{slot.key.removeprefix('model.').replace('.', '')}" in found.header.tensors:
            raise UserError(f"{str(source)!r} holds averaged (EMA) weights too, which would stay unedited; prune them first")
        change = Change(name, slot, edits[name])
        change.check(source, found.header.tensors[slot.key])
        changes.append(change)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        shutil.copyfile(source, temporary)
        _patch(temporary, found.header, changes)
    return out


def _write_folder(source: Path, edits: Mapping[str, list[tuple[Edit, float]]], out: Path) -> Path:
    if out.suffix == ".safetensors" or source.resolve() in out.resolve().parents:
        raise UserError(f"{str(source)!r} is a folder, and {str(out)!r} is a file or inside it; give another folder")
    arch = architecture(str(source))
    headers: dict[str, dict[Path, Header]] = {}
    changes: dict[Path, list[Change]] = {}
    for name, parts in edits.items():
        folder, _, key = arch.diffusers_lora_key(name).partition(".")
        if folder not in headers:
            headers[folder] = {file: read_header(file) for file in sorted((source / folder).glob("*.safetensors"))}
        spellings = (key, name.partition(".")[2])  # as published, or as the libraries of today name it
        places = [(file, spelt) for file, header in headers[folder].items() for spelt in spellings if spelt in header.tensors]
        if not places:
            raise UserError(f"edit changes {name}, {str(source / folder)!r} has no {key} in a .safetensors file; {REMEDY}")
        for file, spelt in dict(places).items():
            change = Change(name, Slot(spelt), parts)
            change.check(file, headers[folder][file].tensors[spelt])
            changes.setdefault(file, []).append(change)
    for file in (file for folder in (source, *(source / name for name in headers)) for file in folder.iterdir()):
        if file.suffix in OTHER_WEIGHTS or (file.suffix == ".safetensors" and file.parent == source):
            raise UserError(f"{str(file)!r} may hold the same weights again, which would stay unedited; move it elsewhere first")
    with replacing_folder(out, marker=INDEX) as temporary:
        shutil.copytree(
            source, temporary, dirs_exist_ok=True, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns(".git", ".cache")
        )
        for file, own in changes.items():
            _patch(temporary / file.relative_to(source), headers[file.parent.name][file], own)
        for file in (path for path in temporary.rglob("*") if path.is_file()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    return out


def _patch(path: Path, header: Header, changes: list[Change]) -> None:
    """Overwrite the tensors of a file that the changes touch, in the order in which they are stored."""
    touched: dict[str, list[Change]] = {}
    for change in changes:
        touched.setdefault(change.slot.key, []).append(change)
    with path.open("r+b") as file:
        for key in sorted(touched, key=lambda key: header.tensors[key].begin):
            stored = header.tensors[key]
            data = bytearray(stored.end - stored.begin)
            file.seek(stored.begin)
            file.readinto(data)
            tensor = torch.frombuffer(data, dtype=DTYPES[stored.dtype]).view(stored.shape)
            for change in touched[key]:
                change.apply(tensor)
            file.seek(stored.begin)
            file.write(data)
