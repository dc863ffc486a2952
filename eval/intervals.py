"""Estimates with 95 % intervals: rates, means and ratios of images that come in clusters.

Images of one prompt are alike, so n images of m prompts tell less than n independent ones: a prompt is a cluster, and
what is resampled or counted as independent is the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval. n: how many images it rests on. Without any image everything is NaN."""

    value: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, Any]:
        """value, low, high and n; what could not be measured is None (JSON has no NaN)."""
        return {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in asdict(self).items()}

    def __str__(self) -> str:
        return "not measured" if math.isnan(self.value) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def wilson(successes: float, n: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval (Wilson 1927). quantile: the normal (or t) quantile of its level; n may be fractional."""
    share, spread = successes / n, quantile**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = quantile / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def rate(outcomes: Sequence[bool], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The share of true outcomes with Wilson's interval at the effective sample size.

    clusters: what each outcome belongs to (its prompt); None means that all are independent.

    With p the share of n outcomes in m clusters, of which cluster c has n_c with y_c true ones, the design effect is

        deff = [m / (m - 1) sum_c (y_c - p n_c)^2 / n^2] / [p (1 - p) / n],     n_eff = n / max(1, deff)

    (the linearised variance of a ratio over the binomial one: Rao & Scott, Biometrics 48, 1992), and the quantile is
    Student's t with m - 1 degrees of freedom once clusters matter (Korn & Graubard, Survey Methodology 24, 1998).
    When all outcomes are equal nothing is known about the clusters and n_eff = n.
    """
    n = len(outcomes)
    if n == 0:
        return NOTHING
    true, sizes = _per_cluster(np.asarray(outcomes, dtype=float), clusters)
    share, m, effective = true.sum() / n, len(sizes), float(n)
    quantile = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    if 0 < share < 1 and 1 < m < n:
        variance = m / (m - 1) * ((true - share * sizes) ** 2).sum() / n**2
        effect = max(1.0, variance / (share * (1 - share) / n))
        effective, quantile = n / effect, student(quantile, m - 1) if effect > 1 else quantile
    low, high = wilson(share * effective, effective, quantile)
    return Estimate(float(share), min(low, float(share)), max(high, float(share)), n)


def student(normal: float, degrees: int) -> float:
    """Student's t quantile from the normal one of the same level (Abramowitz & Stegun 26.7.5; 1 % off at 3 degrees)."""
    x, v = normal, degrees
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
    )
    return x + sum(term / v ** (i + 1) for i, term in enumerate(terms))


def mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0) -> Estimate:
    """The mean with the percentile interval of a bootstrap over clusters (Efron & Tibshirani 1993). Seeded."""
    if not len(values):
        return NOTHING
    sums, sizes = _per_cluster(np.asarray(values, dtype=float), clusters)
    drawn = _resampled(len(sizes), seed)
    low, high = _percentiles(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return Estimate(float(sums.sum() / sizes.sum()), low, high, len(values))


def ratio(after: Sequence[bool], before: Sequence[bool], clusters: Sequence[Hashable] | None = None, *, seed: int = 0) -> Estimate:
    """How many outcomes are true after, relative to before, on the same prompts and seeds; paired cluster bootstrap.

    The bootstrap knows no spread when no outcome changed; then the interval is 1 plus and minus the upper Wilson bound on
    the share of the outcomes true before that could have changed. NaN when none is true before.
    """
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if not first.sum():
        return Estimate(math.nan, math.nan, math.nan, len(first))
    if (first == second).all():
        bound = rate([False] * int(first.sum())).high
        return Estimate(1.0, 1 - bound, 1 + bound, len(first))
    above, _ = _per_cluster(second, clusters)
    below, _ = _per_cluster(first, clusters)
    drawn = _resampled(len(below), seed)
    over, under = above[drawn].sum(1), below[drawn].sum(1)
    low, high = _percentiles(over[under > 0] / under[under > 0])
    return Estimate(float(above.sum() / below.sum()), low, high, len(first))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """The first rate less the second, of independent images, with the interval that follows from theirs.

    Newcombe's hybrid of two score intervals (Statistics in Medicine 17, 1998, method 10): p1 - p2 - sqrt((p1 - l1)^2 + (u2 - p2)^2) up
    to p1 - p2 + sqrt((u1 - p1)^2 + (p2 - l2)^2).
    """
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, low, high, min(first.n, second.n))


def jackknife(kernel_mean: float, left_out: Sequence[float]) -> Estimate:
    """A U-statistic with its normal interval from the leave-one-out values (Arvesen, Ann. Math. Stat. 40, 1969)."""
    values = np.asarray(left_out)
    n = len(values)
    half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * math.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum())
    return Estimate(kernel_mean, kernel_mean - half, kernel_mean + half, n)


def _per_cluster(values: np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of every cluster."""
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise ValueError(f"{len(values)} values and {len(clusters)} clusters")
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([number[cluster] for cluster in clusters])
    return np.bincount(index, values), np.bincount(index).astype(float)


def _resampled(clusters: int, seed: int) -> np.ndarray:
    """The clusters of each bootstrap sample [RESAMPLES, clusters], drawn with replacement."""
    return np.random.default_rng(seed).integers(clusters, size=(RESAMPLES, clusters), dtype=np.int32)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)
