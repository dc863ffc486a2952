"""What computes attention: PyTorch, or xformers' kernels where they work."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.runs import computes_in_bf16

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture

ATTENTIONS = ("sdpa", "xformers")


def use_attention(arch: Architecture, name: str, device: str | torch.device) -> None:
    """Let the denoiser and the image decoder compute attention so, one of `ATTENTIONS`, on the device that they will run on.

    To be called before edits and hooks are attached: it replaces diffusers' attention processors. What xformers cannot compute there
    stays as it is, with a warning that says why. Parts that were left in their files compute nothing, and stay too.
    """
    if name == "sdpa" or arch.unread:
        return
    failed: dict[str, list[str]] = {}
    for part in ("denoiser", "vae"):
        module: Any = arch.components()[part]
        try:
            probe(module, torch.device(device))
            module.enable_xformers_memory_efficient_attention()
        except Exception as error:  # kernels of another CUDA, PyTorch or GPU fail with whatever their authors chose
            failed.setdefault(" ".join(str(error).split())[:200], []).append(part)
    for reason, parts in failed.items():
        warnings.warn(f"xformers cannot be used for the {' and the '.join(parts)} ({reason}); PyTorch's attention is", stacklevel=3)


def probe(module: nn.Module, device: torch.device) -> None:
    """Whether xformers computes attention of the widths in a module on this device, and its gradients; raises what it raises."""
    if device.type != "cuda":
        raise RuntimeError(f"it needs a CUDA device, this one is {device.type}")
    dtypes = [next(module.parameters()).dtype]
    if computes_in_bf16(device.type):
        dtypes.append(torch.bfloat16)  # what training and sampling compute in, whatever the weights are
    for dtype in dict.fromkeys(dtypes):
        for width in head_widths(module):
            attend(width, device, dtype)


def head_widths(module: nn.Module) -> list[int]:
    """Those of the heads of all attention in it, each once."""
    attentions: list[Any] = [part for part in module.modules() if hasattr(part, "processor")]
    return sorted({attention.inner_dim // attention.heads for attention in attentions})


def attend(width: int, device: torch.device, dtype: torch.dtype) -> None:
    """One attention of xformers, forward and backward."""
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    with torch.enable_grad():
        query, key, value = (torch.zeros(2, 8, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        memory_efficient_attention(query, key, value).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a kernel's failure is told later than its call
