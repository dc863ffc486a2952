"""Single-file checkpoints for tests: tiny ones of random models, and sparse ones of the real shapes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.arch import single_file
from toolkit.arch.base import Architecture
from toolkit.arch.ldm import Layout
from toolkit.arch.sd import SD, tiny_tokenizer
from toolkit.arch.sdxl import SDXL
from toolkit.arch.single_file import CONFIGS
from toolkit.model import DTYPES, Model
from toolkit.runs import timed

if TYPE_CHECKING:
    import pytest

FAMILIES: dict[str, type[SD]] = {"sd1": SD, "sd2": SD, "sdxl": SDXL}
PREDICTS: dict[str, Any] = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
Writer = Callable[..., tuple[Model, Path]]


def stored(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The tensors of a single file that holds these parameters."""
    tensors: dict[str, Tensor] = {}
    for name, slot in layout.slots(state).items():
        value = state[name]
        if slot.key not in tensors:
            shape = tuple(value.shape)
            if "in_proj" in slot.key:
                shape = (3 * shape[0], *shape[1:])
            elif slot.key.endswith("text_projection"):
                shape = shape[::-1]
            elif ".mid.attn_1." in slot.key and len(shape) == 2:
                shape = (*shape, 1, 1)
            tensors[slot.key] = value.new_empty(shape)
        slot.view(tensors[slot.key]).copy_(value)
    return tensors


def parameters(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{part}.{name}": value.detach() for part, module in parts.items() for name, value in module.named_parameters()}


def write_configs(arch: Architecture, folder: Path) -> Path:
    """A folder like those in toolkit/arch/configs, of this model."""
    arch.pipe.save_config(folder)
    for name, part in arch.pipe.components.items():
        if hasattr(part, "config") and hasattr(part.config, "save_pretrained"):
            part.config.save_pretrained(folder / name)
        elif hasattr(part, "save_config"):
            part.save_config(folder / name)
    return folder


def write_single_file(
    arch: Architecture, version: str, configs: Path, path: Path, *, dtype: torch.dtype = torch.float32, **metadata: str
) -> Path:
    """A checkpoint in one file of this model, with the things that real ones hold besides."""
    layout = Layout(arch.single_files[version], configs)
    tensors = {key: value.to(dtype) for key, value in stored(parameters(arch.components()), layout).items()}
    prefix = layout.prefixes["text_encoder"]
    extra = {"alphas_cumprod": torch.linspace(0.9, 0.1, 5), f"{prefix}logit_scale": torch.tensor(4.6)}
    if not prefix.endswith(".model."):
        extra[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors | extra, path, {"format": "pt", **metadata})
    return path


def write_all_configs(folder: Path) -> Path:
    """A folder like toolkit/arch/configs in which every version is tiny."""
    for version, family in FAMILIES.items():
        write_configs(family.tiny(prediction_type=PREDICTS[version]), folder / version)
    return folder


def shrink(patch: pytest.MonkeyPatch, configs: Path) -> None:
    """Until the patch is undone all versions are of these sizes."""
    patch.setattr(single_file, "CONFIGS", configs)
    patch.setattr(single_file, "clip_tokenizer", lambda padding: tiny_tokenizer())


def write_tiny(version: str, configs: Path, path: Path, dtype: str = "float32") -> tuple[Model, Path]:
    """A tiny model of a version, and the file that holds it, both in this type."""
    arch = FAMILIES[version].tiny(seed=3, prediction_type=PREDICTS[version])
    metadata = {"modelspec.prediction_type": PREDICTS[version].removesuffix("_prediction"), "author": "somebody"}
    write_single_file(arch, version, configs / version, path, dtype=DTYPES[dtype], **metadata)
    arch.pipe.to(DTYPES[dtype])
    return Model(arch), path


@functools.cache
def real_layout(version: str) -> Layout:
    """Where a single file keeps the parameters of a real model."""
    return Layout(FAMILIES[version].single_files[version], CONFIGS / version)


def real_parts(version: str) -> tuple[dict[str, nn.Module], Layout]:
    """The parts of a real model without memory for their parameters, and where a single file keeps them."""
    layout = real_layout(version)
    return FAMILIES[version].hollow(layout.configs).components(), layout


def write_sparse(shapes: Mapping[str, tuple[int, ...]], path: Path, **metadata: str) -> Path:
    """A file of float16 zeros of these shapes that takes no place on the disk."""
    end = 0
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for key, shape in shapes.items():
        begin, end = end, end + 2 * int(torch.Size(shape).numel())
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def peak_of(work: Callable[[], object]) -> float:
    """The peak of the process's resident memory while it works, in kB, on Linux."""
    with timed() as cost:
        work()
    return 1024 * cost.peak_memory_mb


@functools.cache
def real_shapes(version: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a real checkpoint in one file."""
    parts, layout = real_parts(version)
    return {key: tuple(value.shape) for key, value in stored(parameters(parts), layout).items()}
