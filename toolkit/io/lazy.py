"""Models whose denoiser and image decoder stay in their files: enough for what reads the text encoders and single layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.arch.base import Architecture
from toolkit.arch.single_file import recognise
from toolkit.errors import UserError
from toolkit.io.places import places


class UnreadLinear(nn.Linear):
    """A linear layer whose weight is read from the file each time that somebody asks for it, and kept by him alone.

    So it is until a weight is put in its place, as attaching an edit does.
    """

    read: Callable[[], Tensor]

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        if name == "weight" and value.is_meta:
            return nn.Parameter(self.read().to(value.dtype), requires_grad=False)
        return value


def load_lazily(family: type[Architecture], source: str, *, dtype: torch.dtype) -> Architecture:
    """A model of a folder or a .safetensors file on the disk, as `family.load` gives it, but only its text encoders are loaded.

    The weights of the layers that read text are read when they are looked at; other parameters of the denoiser and of the image
    decoder are on the meta device until an edit changes them. Nothing can be drawn with such a model.
    """
    path = Path(source)
    arch = family.load_text(source, path if path.is_dir() else recognise(path).layout.configs, dtype=dtype)
    parts = arch.components().items()
    left = {f"{part}.{name}": value.shape for part, module in parts for name, value in module.named_parameters() if value.is_meta}
    stored = places(path, lambda: arch, left)

    def read(name: str) -> Tensor:
        # A folder may hold other variants too, "model.fp16.safetensors"; what is loaded is the one without such a word.
        found = [place for place in stored[name] if path.is_file() or "." not in place.file.stem]
        if not found:
            raise UserError(f"{source!r} lacks {name}, which its kind of model has; give a complete checkpoint")
        value = found[0].read()
        if value.shape != left[name]:
            what = f"{name} of {source!r} is {list(value.shape)}, its configuration says {list(left[name])}"
            raise UserError(f"{what}; give a complete checkpoint")
        return value

    def placed(name: str) -> Tensor:
        return read(name).to(arch.device)

    arch.unread = read
    layers: dict[str, Any] = dict(arch.text_linears())
    for site, linear in layers.items():
        linear.__class__ = UnreadLinear
        linear.read = partial(placed, f"{site}.weight")
    return arch
