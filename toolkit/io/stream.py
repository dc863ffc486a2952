"""Edits written into checkpoints without loading them: only the touched tensors are read, all else is copied as it is."""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from toolkit.arch.base import Architecture
from toolkit.arch.single_file import recognise
from toolkit.edits.base import Edit, by_precedence, not_mergeable
from toolkit.errors import UserError
from toolkit.fingerprint import fingerprint, same_base
from toolkit.io.files import PICKLES, replacing_folder
from toolkit.io.header import read_header
from toolkit.io.places import Place, places
from toolkit.model import architecture
from toolkit.runs import replacing

INDEX = "model_index.json"
OTHER_WEIGHTS = (*PICKLES, ".msgpack", ".h5", ".onnx")
REMEDY = "apply it to a model like the one it was fitted on"
Parts = list[tuple[Edit, float]]


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
    for part, scale in by_precedence(edit.parts()):
        if not streamable(part):
            raise not_mergeable(part)
        for name in part.parameter_names():
            touched.setdefault(name, []).append((part, scale))
    arch = functools.cache(lambda: hollow(source))
    changes = []
    for name, found in places(source, arch, touched).items():
        if not found:
            raise UserError(f"edit changes {name}, which no .safetensors file of {str(source)!r} has; {REMEDY}")
        changes += [Change(name, place, touched[name]) for place in found]
    for change in changes:
        change.check()
    if any(part.info.base for part, _ in edit.parts()):
        _check_base(source, arch(), edit, strict)
    return _write_folder(source, changes, out) if source.is_dir() else _write_file(source, changes, out)


def streamable(edit: Edit) -> bool:
    """Whether an edit is of weights alone, so that the checkpoint keeps its form."""
    return all(part.mergeable and bool(part.parameter_names()) for part, _ in edit.parts())


# --- checks ---------------------------------------------------------------------------------------------------------
def hollow(source: Path) -> Architecture:
    """The architecture of a checkpoint on the disk, without its weights."""
    if source.is_dir():
        return architecture(str(source)).hollow(source)
    found = recognise(source)
    return found.family.hollow(found.layout.configs)


def _check_base(source: Path, arch: Architecture, edit: Edit, strict: bool) -> None:
    """Whether the parts of the edit were fitted on this model."""
    found = stored_fingerprint(source, arch)
    for part, _ in edit.parts():
        if not same_base(part.info.base, found):
            message = f"{part.info.method or part.kind()} edit was fitted on another base than {source}; fit it on this one"
            if strict:
                raise UserError(message)
            warnings.warn(message, stacklevel=3)


def stored_fingerprint(source: Path, arch: Architecture) -> dict[str, str]:
    """The fingerprint of a checkpoint on the disk, whose hollow architecture this is. One that is not complete is a UserError."""
    names = [f"{part}.{name}" for part, module in arch.components().items() if part != "vae" for name, _ in module.named_parameters()]
    stored = places(source, lambda: arch, names)
    if lost := [name for name, found in stored.items() if not found]:
        raise UserError(f"{str(source)!r} lacks {len(lost)} parameters of its model, such as {lost[0]}; give a complete checkpoint")
    return fingerprint(arch, lambda name: stored[name][0].read())


# --- writing --------------------------------------------------------------------------------------------------------
def _write_file(source: Path, changes: list[Change], out: Path) -> Path:
    tensors = read_header(source).tensors
    if any(f"model_ema.{change.place.slot.key.removeprefix('model.').replace('.', '')}" in tensors for change in changes):
        raise UserError(f"{str(source)!r} holds averaged (EMA) weights too, which would stay unedited; prune them first")
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
