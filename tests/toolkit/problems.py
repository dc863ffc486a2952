"""Random problems for the closed-form solver, and a naive one that does what the papers' equations say, layer by layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.solve import Change, closed_form


@dataclass
class Problem:
    weights: list[Tensor]
    source: Tensor
    target: Tensor
    keep: Tensor


def problem(seed: int, width: int, n: int, m: int, outs: tuple[int, ...] = (7, 24)) -> Problem:
    make = torch.Generator().manual_seed(seed)
    weights = [torch.randn(out, width, generator=make, dtype=torch.float64) / width**0.5 for out in outs]
    return Problem(weights, *(torch.randn(rows, width, generator=make, dtype=torch.float64) for rows in (n, n, m)))


def naive(weight: Tensor, p: Problem, a: float, b: float, lamb: float) -> Tensor:
    """One layer's weight by the normal equations written out, row by row."""
    left, right = lamb * weight, lamb * torch.eye(weight.shape[1], dtype=torch.float64)
    for c, g in zip(p.source, p.target, strict=True):
        left.addr_(weight @ g, c, alpha=a)
        right.addr_(c, c, alpha=a)
    for k in p.keep:
        left.addr_(weight @ k, k, alpha=b)
        right.addr_(k, k, alpha=b)
    return left @ torch.linalg.inv(right)


def objective(edited: Tensor, weight: Tensor, p: Problem, a: float, b: float, lamb: float) -> Tensor:
    erase = (p.source @ edited.T - p.target @ weight.T).square().sum()
    keep = (p.keep @ (edited - weight).T).square().sum()
    return a * erase + b * keep + lamb * (edited - weight).square().sum()


def relative(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).norm() / wanted.norm())


def solve(p: Problem, a: float = 1.0, b: float = 1.0, lamb: float = 0.5) -> Change:
    return closed_form(p.source, p.target, p.keep, erase_scale=a, preserve_scale=b, lamb=lamb)
