"""Where a checkpoint on the disk keeps each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toolkit.arch.base import Architecture
from toolkit.arch.ldm import Slot
from toolkit.arch.single_file import recognise
from toolkit.errors import UserError
from toolkit.io.header import Stored, read_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROUNDED = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # can be read, but no sum can be written in them


@dataclass(frozen=True)
class Place:
    """Where a parameter is stored: in this file, in this slot, which is a tensor like this."""

    file: Path
    slot: Slot
    stored: Stored

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's type. One in which no sum can be written is a UserError."""
        return self._dtype(DTYPES)

    def read(self) -> Tensor:
        """The parameter, mapped from the file; what is written into it is not written to the file."""
        data = np.memmap(self.file, np.uint8, "c", self.stored.begin, (self.stored.end - self.stored.begin,))
        return self.slot.view(torch.from_numpy(data).view(self._dtype(DTYPES | ROUNDED)).view(self.stored.shape))

    def _dtype(self, known: dict[str, torch.dtype]) -> torch.dtype:
        if self.stored.dtype not in known:
            what = f"{self.slot.key} of {str(self.file)!r} is stored as {self.stored.dtype}, need {', '.join(known)}"
            raise UserError(f"{what}; give a checkpoint of such a type")
        return known[self.stored.dtype]


def places(source: Path, arch: Callable[[], Architecture], names: Iterable[str]) -> dict[str, list[Place]]:
    """Parameter name -> every place of it in a .safetensors file or a diffusers folder; none where it does not have it.

    arch: gives the checkpoint's architecture, which may be hollow; called for a folder only.
    """
    if source.is_dir():
        return _in_folder(source, arch(), names)
    found = recognise(source)
    tensors = found.header.tensors
    return {
        name: [Place(source, slot, tensors[slot.key])] if slot.key in tensors else [] for name, slot in found.layout.slots(names).items()
    }


def _in_folder(source: Path, arch: Architecture, names: Iterable[str]) -> dict[str, list[Place]]:
    """Every file that holds a parameter is a place of it: shards hold it once, variants once each."""
    stored: dict[str, dict[str, list[tuple[Path, Stored]]]] = {}
    found: dict[str, list[Place]] = {}
    for name in names:
        if name.partition(".")[0] not in arch.components():
            found[name] = []
            continue
        folder, _, key = arch.diffusers_lora_key(name).partition(".")
        if folder not in stored:
            stored[folder] = {}
            for file in sorted((source / folder).glob("*.safetensors")):
                for spelling, tensor in read_header(file).tensors.items():
                    stored[folder].setdefault(spelling, []).append((file, tensor))
        spellings = dict.fromkeys((key, name.partition(".")[2]))  # as published, or as the libraries of today name it
        found[name] = [Place(file, Slot(spelt), tensor) for spelt in spellings for file, tensor in stored[folder].get(spelt, ())]
    return found
