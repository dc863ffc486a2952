"""How masks lie over each other, and which of those that were found is which of the true ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def iou(true: Tensor, found: Tensor) -> Tensor:
    """Intersection over union [k, n] of masks [k, h, w] with others [n, h, w], both bool; of two empty ones 0."""
    one, other = true.flatten(1).double(), found.flatten(1).double()
    both = one @ other.T
    return both / (one.sum(1, keepdim=True) + other.sum(1) - both).clamp(min=1)


def partners(overlap: Tensor) -> list[int | None]:
    """For each row of [k, n] its column, or None: one to one, so that the sum is the largest (what Hungarian matching finds).

    Column after column, for each set of rows that have one by then the best way to it: exact, and 2^k sets are few.
    """
    none: list[int | None] = [None] * len(overlap)
    best = {frozenset[int](): (0.0, none)}
    for number, column in enumerate(overlap.T.tolist()):
        for rows, (total, given) in list(best.items()):
            for row in set(range(len(column))) - rows:
                grown = rows | {row}
                if grown not in best or total + column[row] > best[grown][0]:
                    best[grown] = (total + column[row], [*given[:row], number, *given[row + 1 :]])
    return max(best.values(), key=lambda way: way[0])[1]


def at_places(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masks [k, h, w] at the places of a grid: those which one covers by more than half."""
    return F.interpolate(masks[:, None].float(), grid, mode="area")[:, 0] > 0.5
