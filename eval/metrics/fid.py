"""FID: how far a set of images is from another one, as two Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eval.intervals import NOTHING, Estimate
from eval.metrics.features import FeatureDistance


@dataclass(frozen=True)
class Fid(FeatureDistance):
    """Frechet Inception Distance, Heusel et al., arXiv 1706.08500.

        |m - m'|^2 + tr(S + S' - 2 (S S')^{1/2})

    It falls with the number of images, so values compare at equal `n` and `n_compared_with` only, and it has no interval: its bias is
    larger than its spread. KID has neither fault. Covariances are divided by n - 1, as pytorch-fid, clean-fid and torch-fidelity do.
    """

    compares: ClassVar = "images"
    paper: ClassVar = "arXiv:1706.08500"

    def estimate(self, rows: Tensor, prompts: Sequence[str]) -> Estimate:
        drawn, beside = self.sides(rows)
        if min(len(drawn), len(beside)) < 2:
            return NOTHING
        return Estimate(frechet(drawn.double(), beside.double()), math.nan, math.nan, len(drawn))


def frechet(x: Tensor, y: Tensor) -> float:
    """The squared Frechet distance of the Gaussians with the means and covariances of x [n, d] and y [m, d], float64."""
    s, t = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(y.shape[1], -1)
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # tr (S T)^{1/2} = tr (S^{1/2} T S^{1/2})^{1/2}, of a symmetric matrix: no square root of a product that rounding made complex.
    cross = torch.linalg.eigvalsh(root @ t @ root).clamp_min(0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + s.trace() + t.trace() - 2 * cross)
