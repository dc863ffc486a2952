"""Regions of a picture out of what its places attend to: clusters that merge with their neighbours while little is lost by it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def agglomerate(
    rows: np.ndarray, sizes: Sequence[float], neighbours: Sequence[set[int]], *, until: int = 1, limit: float = np.inf, evenly: bool = False
) -> np.ndarray:
    """Merge neighbouring clusters, those first by whose merging least is lost; returns each one's cluster [n], numbered from 0.

        d(a, b) = (n_a + n_b) JSD_pi(a, b),    JSD_pi(a, b) = H(pi_a a + pi_b b) - pi_a H(a) - pi_b H(b),    pi_a = n_a / (n_a + n_b)
    is what the clusters tell less of where their members attend to when a and b are one (the agglomerative information
    bottleneck, Slonim & Tishby, NIPS 1999), in nats. evenly: d(a, b) is instead JSD with pi = 1/2, from 0 to ln 2, whatever their sizes.

    rows: [n, m] distributions, each of mean n_a members. neighbours: of each the numbers of others, both ways. It ends with
    `until` clusters, or when no neighbours are left, or none nearer than `limit`.
    """
    rows, weights = rows.astype(np.float64), list(map(float, sizes))
    entropies = [float(_entropy(row)) for row in rows]
    around, version, into = [set(own) for own in neighbours], [0] * len(rows), list(range(len(rows)))

    def distances(one: int, others: Sequence[int]) -> np.ndarray:
        own, theirs = weights[one], np.array([weights[i] for i in others])
        part = np.full(len(theirs), 0.5) if evenly else own / (own + theirs)
        both = part[:, None] * rows[one] + (1 - part)[:, None] * rows[list(others)]
        lost = _entropy(both) - part * entropies[one] - (1 - part) * np.array([entropies[i] for i in others])
        return lost if evenly else (own + theirs) * lost

    heap: list[tuple[float, int, int, int, int]] = []

    def offer(one: int, others: Sequence[int]) -> None:
        for value, other in zip(distances(one, others) if others else (), others, strict=True):
            heapq.heappush(heap, (float(value), one, other, version[one], version[other]))

    for one, own in enumerate(around):
        offer(one, [other for other in sorted(own) if other > one])
    left = len(rows)
    while left > until and heap:
        value, a, b, *seen = heapq.heappop(heap)
        if seen != [version[a], version[b]] or into[a] != a or into[b] != b:
            continue
        if value > limit:
            break
        share = weights[a] / (weights[a] + weights[b])
        rows[a] = share * rows[a] + (1 - share) * rows[b]
        entropies[a], weights[a], into[b], left = float(_entropy(rows[a])), weights[a] + weights[b], a, left - 1
        version[a] += 1
        around[a] = (around[a] | around[b]) - {a, b}
        for other in around[a]:
            around[other] = (around[other] - {b}) | {a}
        offer(a, sorted(around[a]))
    return np.unique([_root(into, i) for i in range(len(into))], return_inverse=True)[1]


def touching(labels: np.ndarray) -> list[set[int]]:
    """Of each label of a map [h, w], numbered from 0, those of the places beside, above and below its own; -1 is nobody's."""
    found: list[set[int]] = [set() for _ in range(int(labels.max()) + 1)]
    for one, other in ((labels[:-1], labels[1:]), (labels[:, :-1], labels[:, 1:])):
        for a, b in {*zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)}:
            if a != b and min(a, b) >= 0:
                found[a].add(b)
                found[b].add(a)
    return found


def _entropy(rows: np.ndarray) -> np.ndarray:
    """Of distributions along the last axis, in nats."""
    return -(rows * np.log(np.maximum(rows, 1e-30))).sum(-1)


def _root(into: Sequence[int], one: int) -> int:
    """The cluster that one has gone into in the end."""
    while into[one] != one:
        one = into[one]
    return one
