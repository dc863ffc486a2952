"""Tensors that take time to compute, kept in the user's cache folder for the next run."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.runs import cache_folder, replacing


def cached(room: str, key: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, on the CPU; from the file of a former call with the same key when there is one.

    It is contiguous then as it is at the first call: of tensors that differ in their strides alone layers give results that differ in
    rounding, so that a run would not go on as it began.

    room: the folder in `cache_folder`. key: everything that decides the result, as JSON. A folder that cannot be written is warned of.
    """
    folder = cache_folder()
    if folder is None:
        return make()
    path = folder / room / f"{hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError):  # not there, or damaged: it can be computed again
        made = {name: value.detach().cpu().contiguous() for name, value in make().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(made, temporary)
    except OSError as error:
        warnings.warn(f"cannot keep the {room} in {folder} ({error}); set PALIMPSEST_CACHE to a folder, or to off", stacklevel=2)
    return made
