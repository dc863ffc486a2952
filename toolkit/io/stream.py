"""Edits written into checkpoints without loading them: only the touched tensors are read, all else is copied as it is."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toolkit.arch.base import Architecture
from toolkit.arch.ldm import Slot
from toolkit.arch.single_file import recognise
from toolkit.edits.base import Edit, not_mergeable
from toolkit.errors import UserError
from toolkit.fingerprint import fingerprint, same_base
from toolkit.io.files import PICKLES, replacing_folder
from toolkit.io.header import Stored, read_header
from toolkit.model import architecture
from toolkit.runs import replacing

INDEX = "model_index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_WEIGHTS = (*PICKLES, ".msgpack", ".h5", ".onnx")
REMEDY = "apply it to a model like the one it was fitted on"
Parts = list[tuple[Edit, float]]


@dataclass(frozen=True)
class Place:
    """Where a parameter is stored: in this file, in this slot, which is a tensor like this."""

    file: Path
    slot: Slot
    stored: Stored

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's type. One in which no sum can be written is a UserError."""
        if self.stored.dtype not in DTYPES:
            what = f"{self.slot.key} of {str(self.file)!r} is stored as {self.stored.dtype}, need {', '.join(DTYPES)}"
            raise UserError(f"{what}; give a checkpoint of such a type")
        return DTYPES[self.stored.dtype]

    def read(self) -> Tensor:
        """The parameter, mapped from the file; what is written into it is not written to the file."""
        data = np.memmap(self.file, np.uint8, "c", self.stored.begin, (self.stored.end - self.stored.begin,))
        return self.slot.view(torch.from_numpy(data).view(self.dtype).view(self.stored.shape))


@dataclass(frozen=True)
class Change:
    """What becomes of a parameter at one place: the parts of the edit that change it, in order, with their scales."""

    name: str
    place: Place
    parts: Parts

    def check(self) -> None:
        """Whether what is stored can take it."""
        needed = tuple(self.place.slot.view(torch.empty(self.place.stored.shape, dtype=self.place.dtype, device="meta")).shape)
        for edit, _ in self.parts:
            if (given := edit.shape(self.name)) != needed:
                raise UserError(f"edit of {self.name} is {list(given)}, {str(self.place.file)!r} has {list(needed)}; {REMEDY}")

    @torch.no_grad()
    def apply(self, stored: Tensor) -> None:
        """Change the stored tensor in place: the parts in order, in float32, rounded once to its type."""
        parameter = self.place.slot.view(stored)
        value = parameter.to(torch.promote_types(stored.dtype, torch.float32))
        for edit, scale in self.parts:
            value = edit.weight(self.name, value, scale)
        parameter.copy_(value)


def write_checkpoint(source: str | Path, edit: Edit, out: str | Path, *, strict: bool = False) -> Path:
    """Write a copy of a checkpoint with an edit merged in, as `Model.attach` and saving would. Returns `out`.

    source: a .safetensors file, then `out` is one too; or a diffusers folder, then `out` is one too. They may be the same.
    The copy differs from the source in the values of the tensors that the edit changes, and in nothing else: types, header
    and other files are the same. It takes its place when it is complete; until then, and when this raises, `out` is as it
    was. In memory is one tensor at a time.

    An edit that does not fit, or that is not of weights alone, is a UserError before anything is written. One that was fitted
    on another base is a warning, an error when `strict`.
    """
    source, out = Path(source), Path(out)
    if source.is_dir():
        if out.suffix == ".safetensors" or source.resolve() in out.resolve().parents:
            raise UserError(f"{str(source)!r} is a folder, and {str(out)!r} is a file or inside it; give another folder")
    elif out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"{str(source)!r} is one file, and {str(out)!r} is not one .safetensors file; give such a name")
    touched: dict[str, Parts] = {}
    for part, scale in edit.parts():
        if not streamable(part):
            raise not_mergeable(part)
        for name in part.parameter_names():
            touched.setdefault(name, []).append((part, scale))
    arch, places = _find(source, touched)
    changes = [Change(name, place, touched[name]) for name, found in places.items() for place in found]
    for change in changes:
        change.check()
    if any(part.info.base for part, _ in edit.parts()):
        _check_base(source, arch(), edit, strict)
    return _write_folder(source, changes, out) if source.is_dir() else _write_file(source, changes, out)


def streamable(edit: Edit) -> bool:
    """Whether an edit is of weights alone, so that the checkpoint keeps its form."""
    return all(part.mergeable and bool(part.parameter_names()) for part, _ in edit.parts())


# --- where parameters are -------------------------------------------------------------------------------------------
def _find(source: Path, names: Iterable[str]) -> tuple[Callable[[], Architecture], dict[str, list[Place]]]:
    """What makes the checkpoint's architecture, hollow, and the places of these parameters."""
    if source.is_dir():
        arch = architecture(str(source)).hollow(source)
        return lambda: arch, _find_in_folder(source, arch, names)
    found = recognise(source)
    places = {}
    for name, slot in found.layout.slots(names).items():
        if slot.key not in found.header.tensors:
            raise UserError(f"edit changes {name}, {str(source)!r} has no {slot.key}; {REMEDY}")
        if f"model_ema.{slot.key.removeprefix('model.').replace('.', '')}" in found.header.tensors:
            raise UserError(f"{str(source)!r} holds averaged (EMA) weights too, which would stay unedited; prune them first")
        places[name] = [Place(source, slot, found.header.tensors[slot.key])]
    return lambda: found.family.hollow(found.layout.configs), places


def _find_in_folder(source: Path, arch: Architecture, names: Iterable[str]) -> dict[str, list[Place]]:
    """Every file that holds a parameter is a place of it: shards hold it once, variants once each."""
    stored: dict[str, dict[str, list[tuple[Path, Stored]]]] = {}
    places = {}
    for name in names:
        if name.partition(".")[0] not in arch.components():
            raise UserError(f"edit changes {name}, which {str(source)!r} ({arch.name}) does not have; {REMEDY}")
        folder, _, key = arch.diffusers_lora_key(name).partition(".")
        if folder not in stored:
            stored[folder] = {}
            for file in sorted((source / folder).glob("*.safetensors")):
                for spelling, tensor in read_header(file).tensors.items():
                    stored[folder].setdefault(spelling, []).append((file, tensor))
        spellings = dict.fromkeys((key, name.partition(".")[2]))  # as published, or as the libraries of today name it
        places[name] = [Place(file, Slot(spelt), tensor) for spelt in spellings for file, tensor in stored[folder].get(spelt, ())]
        if not places[name]:
            raise UserError(f"edit changes {name}, {str(source / folder)!r} has no {key} in a .safetensors file; {REMEDY}")
    return places


def _check_base(source: Path, arch: Architecture, edit: Edit, strict: bool) -> None:
    """Whether the parts of the edit were fitted on this model."""
    names = [f"{part}.{name}" for part, module in arch.components().items() if part != "vae" for name, _ in module.named_parameters()]
    _, places = _find(source, names)
    found = fingerprint(arch, lambda name: places[name][0].read())
    for part, _ in edit.parts():
        if not same_base(part.info.base, found):
            message = f"{part.info.method or part.kind()} edit was fitted on another base than {source}; fit it on this one"
            if strict:
                raise UserError(message)
            warnings.warn(message, stacklevel=3)


# --- writing --------------------------------------------------------------------------------------------------------
def _write_file(source: Path, changes: list[Change], out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        shutil.copyfile(source, temporary)
        _patch(temporary, changes)
    return out


def _write_folder(source: Path, changes: list[Change], out: Path) -> Path:
    by_file: dict[Path, list[Change]] = {}
    for change in changes:
        by_file.setdefault(change.place.file, []).append(change)
    for file in (file for folder in {source, *(file.parent for file in by_file)} for file in folder.iterdir()):
        if file.suffix in OTHER_WEIGHTS or (file.suffix == ".safetensors" and file.parent == source):
            raise UserError(f"{str(file)!r} may hold the same weights again, which would stay unedited; move it elsewhere first")
    with replacing_folder(out, marker=INDEX) as temporary:
        hidden = shutil.ignore_patterns(".git", ".cache")  # where a download keeps the unedited weights once more
        shutil.copytree(source, temporary, dirs_exist_ok=True, copy_function=shutil.copyfile, ignore=hidden)
        for file, own in by_file.items():
            _patch(temporary / file.relative_to(source), own)
        for file in (path for path in temporary.rglob("*") if path.is_file()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    return out


def _patch(path: Path, changes: list[Change]) -> None:
    """Overwrite the tensors of a copied file that the changes touch, in the order in which they are stored."""
    touched: dict[int, list[Change]] = {}
    for change in changes:
        touched.setdefault(change.place.stored.begin, []).append(change)
    with path.open("r+b") as file:
        for begin, own in sorted(touched.items()):
            stored = own[0].place.stored
            data = bytearray(stored.end - begin)
            file.seek(begin)
            file.readinto(data)
            tensor = torch.frombuffer(data, dtype=own[0].place.dtype).view(stored.shape)
            for change in own:
                change.apply(tensor)
            file.seek(begin)
            file.write(data)
