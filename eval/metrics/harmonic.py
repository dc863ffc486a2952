"""The harmonic mean of how well a concept is erased and how well the rest is retained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from eval.intervals import NOTHING, Estimate
from eval.metrics.labels import Labelled


@dataclass(frozen=True)
class Harmonic(Labelled):
    """The overall score of MACE, Lu et al., arXiv 2403.06135, which is low when either erasing or retaining fails.

        H = 2 / (1 / efficacy + 1 / specificity)

    efficacy: 1 - the target's accuracy. specificity: the accuracy of the others of its domain. For objects MACE has a third term,
    generality, 1 - the accuracy of the target's synonyms: see `harmonic_mean`.
    """

    paper: ClassVar = "arXiv:2403.06135"

    def estimate(self, rows: Tensor, prompts: Sequence[str]) -> Estimate:
        found = self.accuracies(rows, prompts)
        return harmonic_mean(found["unlearning_accuracy"], found["in_domain_retain_accuracy"])


def harmonic_mean(*rates: Estimate) -> Estimate:
    """The harmonic mean of rates; 0 when one is 0.

    It rises with each rate, so the ends of its interval are those of all the rates' lower and of all their upper ends: never too
    narrow, since they need not be wrong together.
    """
    if any(rate.n == 0 for rate in rates):
        return NOTHING
    value, low, high = (_harmonic([getattr(rate, end) for rate in rates]) for end in ("value", "low", "high"))
    return Estimate(value, low, high, sum(rate.n for rate in rates))


def _harmonic(values: Sequence[float]) -> float:
    return len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0
