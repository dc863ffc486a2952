"""What tells one base model from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.arch.base import Architecture

SAMPLES = 256  # values looked at in each parameter


def fingerprint(arch: Architecture, read: Callable[[str], Tensor] | None = None) -> dict[str, str]:
    """What identifies the weights that edits may change (all but the image decoder's).

    architecture; shapes: a hash of all parameter names and shapes; dtype of the denoiser; weights: a hash of a strided
    sample of each parameter; signs: one of the sample's signs alone, which survive rounding to another dtype.

    read: gives a parameter's values by its name, where `arch` is hollow; they are taken in the types that they have.
    """
    shapes, weights, signs = (hashlib.blake2b(digest_size=16) for _ in range(3))
    dtypes: dict[str, torch.dtype] = {}
    for component, module in sorted(arch.components().items()):
        if component == "vae":
            continue
        for name, parameter in module.named_parameters():
            shapes.update(f"{component}.{name} {tuple(parameter.shape)}\n".encode())
            given = read or (arch.unread if parameter.is_meta else None)
            values = (given(f"{component}.{name}") if given else parameter.detach()).flatten()
            sample = values[:: max(1, len(values) // SAMPLES)].cpu()
            sample = (sample if read else sample.to(parameter.dtype)).contiguous()
            dtypes.setdefault(component, sample.dtype)
            weights.update(sample.view(torch.uint8).numpy().tobytes())
            signs.update(np.packbits(torch.signbit(sample).numpy()).tobytes())
    return {
        "architecture": arch.name,
        "shapes": shapes.hexdigest(),
        "dtype": str(dtypes["denoiser"]).removeprefix("torch."),
        "weights": weights.hexdigest(),
        "signs": signs.hexdigest(),
    }


def text_fingerprint(arch: Architecture) -> str:
    """What decides how prompts are encoded, with the edits that are attached now: every value of the text encoders' parameters,
    their configurations and their tokenizers.

    It reads all weights, unlike `fingerprint`: a sparse edit may change few values.
    """
    digest = hashlib.blake2b(arch.name.encode(), digest_size=16)
    for name, tokenizer in sorted(arch.tokenizers().items()):
        encoder: Any = arch.components()[name]
        # How the last call padded and truncated is no part of what the tokenizer is.
        spelling = {**json.loads(tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None}
        digest.update(json.dumps([name, encoder.config.to_json_string(), spelling]).encode())
        _read_all(encoder, digest)
    return digest.hexdigest()


def image_fingerprint(arch: Architecture) -> str:
    """What decides how pictures are encoded: every value of the image encoder's parameters, and its configuration."""
    vae: Any = arch.components()["vae"]
    settings = {name: value for name, value in vae.config.items() if not name.startswith("_")}  # those say where it was loaded from
    digest = hashlib.blake2b(json.dumps(settings, default=str, sort_keys=True).encode(), digest_size=16)
    _read_all(vae, digest)
    return digest.hexdigest()


def _read_all(module: nn.Module, digest: Any) -> None:
    for path, parameter in module.named_parameters():
        digest.update(f"{path} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def same_base(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two fingerprints are of one base model, which may be rounded differently. An unknown one passes."""
    if not one or not other:
        return True
    weights = "weights" if one.get("dtype") == other.get("dtype") else "signs"
    return all(one.get(key) == other.get(key) for key in ("architecture", "shapes", weights))
