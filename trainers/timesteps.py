"""Which noise levels a training step draws."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def timesteps(kind: str, count: int, total: int, generator: Generator) -> Tensor:
    """`count` timesteps below `total`, int64.

    uniform: independent. stratified: one in each of `count` equal parts, in random order. cubic: (1 - u^3) of the total,
    u uniform, as in diffusers' T2I-Adapter training.
    """
    u = stratified(count, generator) if kind == "stratified" else torch.rand(count, generator=generator, dtype=torch.float64)
    if kind == "cubic":
        u = 1 - u**3
    return (u * total).long().clamp(max=total - 1)


def stratified(count: int, generator: Generator | None = None) -> Tensor:
    """float64 [count], one uniform number in each of `count` equal parts of [0, 1), in random order."""
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    return (torch.randperm(count, generator=generator) + u) / count
