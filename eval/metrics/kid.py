"""KID: how far a set of images is from another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from eval.fidelity import polynomial_mmd, unpaired_mmd
from eval.intervals import Estimate
from eval.metrics.features import FeatureDistance


@dataclass(frozen=True)
class Kid(FeatureDistance):
    """Kernel Inception Distance, Binkowski et al., arXiv 1801.01401: the unbiased MMD^2 under k(x, y) = (x^T y / d + 1)^3.

    All images are used at once, where torch-fidelity and clean-fid average over subsets of 1000: the same expectation, a smaller
    variance. Against the unedited model the estimate is paired by prompt and seed, so that it is 0 for an edit that changes nothing,
    and may be below 0. The interval is the jackknife's.
    """

    compares: ClassVar = "images"
    paper: ClassVar = "arXiv:1801.01401"

    def estimate(self, rows: Tensor, prompts: Sequence[str]) -> Estimate:
        return (polynomial_mmd if self.needs_references else unpaired_mmd)(*self.sides(rows))
