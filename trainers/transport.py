"""How far mass has to be moved to make one map of another: the earth mover's distance, by Sinkhorn's iterations."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 60  # in which the smoothing falls from the width of the maps to what is asked for, and as many after these


def transport(have: Tensor, want: Tensor, grid: tuple[int, int], smoothing: float = 0.3) -> Tensor:
    """The cost [n] of moving the mass of `have` to where `want` has it, per unit of mass, in places of the grid.

        min_P sum_ij P_ij (|x_i - x_j| + e log(P_ij / (have_i want_j))),    P with the two as its margins,
    which is the distance itself for a smoothing e of 0, and a little more above. It is computed in the log domain (Cuturi 2013;
    Peyré & Cuturi 2019, chapter 4) with e lowered round by round. The gradient is the potentials of the dual, which at the minimum are
    that of the value; the iterations keep no graph.

    have, want: [n, rows * columns], not negative; each is divided by its sum.
    """
    have, want = (one.float() / one.float().sum(-1, keepdim=True) for one in (have, want))
    with torch.no_grad():
        places = torch.cartesian_prod(*(torch.arange(float(side), device=have.device) for side in grid))
        distance = torch.cdist(places, places)
        p, q = (one.clamp(min=1e-12).log() for one in (have, want))
        f, g = torch.zeros_like(p), torch.zeros_like(q)
        widest = float(distance.max().clamp(min=smoothing))
        for number in range(2 * ROUNDS):
            e = max(smoothing, widest * (smoothing / widest) ** ((number + 1) / ROUNDS))
            f = -e * (((g[:, None] - distance) / e) + q[:, None]).logsumexp(2)
            g = -e * (((f[:, None] - distance) / e) + p[:, None]).logsumexp(2)
    return (f * have).sum(-1) + (g * want).sum(-1)
