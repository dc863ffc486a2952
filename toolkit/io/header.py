"""What a .safetensors file holds, without reading its tensors.

A file is the length of its header (8 bytes, little-endian), the header (JSON) and the tensors' bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from toolkit.errors import UserError
from toolkit.io.files import PICKLES


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its type as the header writes it ("F16"), its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """tensors: by name, in the header's order. metadata: the header's own words about the file."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The header of a .safetensors file. A pickle, a damaged file or none is a UserError."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise UserError(f"{str(path)!r} is a pickle, which can run code when it is loaded; convert it to .safetensors first")
    if not path.is_file():
        raise UserError(f"no file {str(path)!r}; give a .safetensors file that is there")
    try:
        with safe_open(path, framework="pt"):  # checks that names, sizes and places agree with one another and with the file
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is damaged or no safetensors file ({error}); download it again") from error
    with path.open("rb") as file:
        start = 8 + (length := int.from_bytes(file.read(8), "little"))
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: Stored(entry["dtype"], tuple(entry["shape"]), *(start + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
    }
    return Header(tensors, metadata)
