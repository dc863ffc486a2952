"""Edit files: one .safetensors each, with its kind and origin in the header.

The header has one key, "palimpsest": a JSON object with `format` (1), `kind`, `info` (`EditInfo`) and `digest`, a hash of
the tensors. Nothing in a file is ever executed; pickles are refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit import registry
from toolkit.edits.base import Edit, EditInfo
from toolkit.errors import UserError
from toolkit.runs import replacing

if TYPE_CHECKING:
    from toolkit.model import Model

FORMAT = 1
HEADER = "palimpsest"
FILE_NAME = "edit.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def save_edit(edit: Edit, path: str | Path) -> Path:
    """Write an edit to a .safetensors file. A reader never sees a part of it; an old file stays until it is complete."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"edit file {str(path)!r} does not end in .safetensors; give such a name")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in edit.tensors().items()}
    header = {"format": FORMAT, "kind": edit.kind(), "info": dataclasses.asdict(edit.info), "digest": _digest(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary, {HEADER: json.dumps(header, ensure_ascii=False, default=str)})
    return path


def load_edit(path: str | Path, model: Model | Callable[[], Model] | None = None) -> Edit:
    """Read an edit from its file, or from the folder that a command wrote it to.

    Files of other tools are read too: LoRAs (diffusers', Kohya's) as low-rank edits, textual-inversion embeddings as token
    edits. Unlike an edit, a LoRA says where it belongs in terms of a model that the reader must have: such a file needs `model`
    (or a function that gives it, which is called for such a file only), and becomes an edit of exactly that model's layers.

    A pickle, a damaged file, another kind of file, or one of a format that this version does not know is a UserError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise UserError(f"no edit file {str(path)!r}; give the .safetensors file that erase, customize, compose or another tool wrote")
    if path.suffix in PICKLES:
        raise UserError(f"{str(path)!r} is a pickle, which can run code when it is loaded; give a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is damaged or no safetensors file ({error}); fit or download it again") from error
    if HEADER in metadata:
        return _read(str(path), metadata, tensors)
    from toolkit.io.adapters import read_adapter  # which knows architectures; those use this file

    return read_adapter(str(path), metadata, tensors, model)


def _read(path: str, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Edit:
    try:
        header: dict[str, Any] = json.loads(metadata[HEADER])
        version, kind, info, digest = (header[key] for key in ("format", "kind", "info", "digest"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path!r} has a damaged header ({error}); fit or download it again") from error
    if version != FORMAT:
        raise UserError(f"{path!r} has format {version}, this version reads {FORMAT}; update palimpsest or fit the edit again")
    if digest != _digest(tensors):
        raise UserError(f"{path!r} is damaged: its tensors are not the ones that were saved; fit or download it again")
    return registry.load("edit", kind).from_tensors(tensors, EditInfo.from_json(info))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of all names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def replacing_folder(folder: str | Path, *, marker: str) -> Iterator[Path]:
    """A temporary folder beside `folder` to write to; at the end of the block it takes its place as a whole.

    An existing folder is replaced only when it is empty or contains the file `marker`; anything else is a UserError.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and ((folder / marker).is_file() or not any(folder.iterdir()))):
        raise UserError(f"{str(folder)!r} holds something else than what is written here; give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{uuid.uuid4().hex}.{folder.name}")
    old = temporary.with_suffix(".old")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
