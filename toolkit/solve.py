"""The closed-form weight editor, for all layers that read the text encoder at once.

Row convention: text embeddings are rows, so `source` is [n, d] for n token embeddings of width d, while the papers
write them as columns. A layer's weight W0 is [o, d] as in torch.nn.Linear. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.errors import UserError

_BLOCK = 4096  # rows turned to float64 at a time
_COLUMNS = 256  # columns of a symmetric product computed at a time
_SINGULAR = 1e13  # condition number above which float64 leaves the solution no reliable digits
_DOUBTFUL = 1e-9  # reciprocal condition number, by a rough bound, below which the true one is computed


@dataclass(frozen=True)
class Change:
    """A change of the text embeddings, x -> (I + D) x with D = U V: every layer's weight becomes W0 (I + D).

    u: [d, r]. v: [r, d]. Both float64.
    """

    u: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        """r, the number of columns of U; the rank of D is at most this."""
        return self.u.shape[1]

    def matrix(self) -> Tensor:
        """I + D [d, d]."""
        return torch.eye(len(self.u), dtype=self.u.dtype, device=self.u.device) + self.u @ self.v

    def then(self, later: Change) -> Change:
        """Both changes, `later` fitted to the weights that this one gave: (I + D)(I + D') - I, exactly.

        Columns that both U start with, as when the same rows are moved to the same targets once more, are held once.
        """
        both = min(self.rank, later.rank)
        same = int((self.u[:, :both] == later.u[:, :both]).all(0).cumprod(0).sum())
        v = self.v + (self.v @ later.u) @ later.v
        v[:same] += later.v[:same]
        return Change(torch.cat([self.u, later.u[:, same:]], 1), torch.cat([v, later.v[same:]]))

    def compressed(self, tolerance: float = 1e-12) -> Change:
        """The same D without the directions that are below `tolerance` of its largest singular value.

        U and V come back `balanced`.
        """
        return Change(*balanced(self.u, self.v, tolerance))


def balanced(u: Tensor, v: Tensor, tolerance: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Other factors of U V, without the directions that are below `tolerance` of its largest singular value.

    u: [m, r]. v: [r, n]. The factors come back with orthogonal columns and rows of equal scale, so that rounding them to
    float32 costs their product no more than rounding the product itself would.
    """
    left, core_left = torch.linalg.qr(u)
    right, core_right = torch.linalg.qr(v.T)
    a, sigma, b = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    kept = sigma > tolerance * sigma[:1]  # the largest, if there is any
    root = sigma[kept].sqrt()
    return left @ a[:, kept] * root, root[:, None] * (b[kept] @ right.T)


def closed_form(
    source: Tensor,
    target: Tensor,
    keep: Tensor,
    *,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    lamb: float = 0.5,
    prior: Tensor | None = None,
    option: str = "lamb",
) -> Change:
    """The D that minimises, for every weight W0 at once,

        a sum_i ||W0 (I + D) c_i - W0 g_i||^2 + p sum_j ||W0 D k_j||^2 + tr(W0 D M D^T W0^T) + lamb ||W0 D||_F^2,

    which is D = [a sum_i (g_i - c_i) c_i^T] (lamb I + M + a sum_i c_i c_i^T + p sum_j k_j k_j^T)^{-1}, independent of W0.
    The system is d x d, or, without M, as wide as there are rows when these are fewer than d (the push-through identity).

    source c: [n, d]. target g: [n, d]. keep k: [m, d], m may be 0. erase_scale a > 0, preserve_scale p >= 0.
    prior M: [d, d], the weighted second moment of more rows to keep than one wants to hold; None for none.
    option: what the user calls `lamb`, for the error that a singular system gives.
    Returns U = (g - c)^T [d, n] and V [n, d] when n < d, else U = I and V = D [d, d]; no more than d x d is held in float64
    for any number of rows.
    Source: UCE (arXiv 2308.14761), equation 7, with v_i = W0 g_i.
    """
    check_weights(erase_scale, preserve_scale, lamb, option)
    n, width = source.shape
    if not preserve_scale:
        keep = keep[:0]
    cure = f"raise {option} (now {lamb:g})"
    if prior is None and n + len(keep) < width:
        rows = torch.cat([erase_scale**0.5 * source.double(), preserve_scale**0.5 * keep.double()])
        v = erase_scale**0.5 * _solve(_ridge(rows @ rows.T, lamb), rows, cure)[:n]
        return Change((target.double() - source.double()).T, v)
    system = erase_scale * second_moment(source) + preserve_scale * second_moment(keep)
    if prior is not None:
        system += prior
    if n < width:
        v = erase_scale * _solve(_ridge(system, lamb), source.double().T, cure).T
        return Change((target.double() - source.double()).T, v)
    v = erase_scale * _solve(_ridge(system, lamb), _shift(source, target), cure).T
    return Change(torch.eye(width, dtype=v.dtype, device=v.device), v)


def check_weights(erase_scale: float, preserve_scale: float, lamb: float, option: str = "lamb") -> None:
    """Whether these can be the weights of a `closed_form`; if not, a UserError."""
    if not 0 < erase_scale < float("inf"):
        raise UserError(f"erase_scale is {erase_scale}, needs a number above 0; give such a weight")
    for name, value in (("preserve_scale", preserve_scale), (option, lamb)):
        if not 0 <= value < float("inf"):
            raise UserError(f"{name} is {value}, needs a number of at least 0; give such a weight")


class Sums:
    """What `closed_form` needs of rows that come a few at a time: two d x d matrices in float64, however many rows there are.

    width d of the rows, which are brought to `device`.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.system = torch.zeros(width, width, dtype=torch.float64, device=device)  # weighted sum of c c^T and k k^T
        self.shift = torch.zeros_like(self.system)  # weighted sum of c (g - c)^T

    def move(self, source: Tensor, target: Tensor, weight: float) -> None:
        """Rows to move and where each goes, both [n, d]."""
        source, target = source.to(self.system.device), target.to(self.system.device)
        self.system.add_(second_moment(source), alpha=weight)
        self.shift.add_(_shift(source, target), alpha=weight)

    def keep(self, rows: Tensor, weight: float) -> None:
        """Rows to keep [m, d]."""
        self.system.add_(second_moment(rows.to(self.system.device)), alpha=weight)

    def change(self, lamb: float) -> Change:
        """The D of `closed_form` for all rows so far; its rank is that of the shifts g - c."""
        x, y = balanced(self.shift, torch.eye(len(self.shift), dtype=self.shift.dtype, device=self.shift.device))
        return Change(y.T, _solve(_ridge(self.system.clone(), lamb), x, f"raise lamb (now {lamb:g})").T)


def preimage(weights: Iterable[Tensor], originals: Iterable[Tensor], rows: Tensor, reg: float) -> Tensor:
    """Embeddings that make the edited layers answer as the original ones did to `rows`: for each row c the minimiser of

        sum_l ||W_l c' - W0_l c||^2 + reg ||c'||^2,   c' = (reg I + sum_l W_l^T W_l)^{-1} (sum_l W_l^T W0_l) c.

    weights W_l, originals W0_l: [o_l, d]. rows: [n, d]. Returns [n, d], float64. Source: RECE (arXiv 2407.12383).
    """
    columns = rows.double().T
    system, right = torch.zeros(len(columns), len(columns), dtype=columns.dtype, device=columns.device), torch.zeros_like(columns)
    for weight, original in zip(weights, originals, strict=True):
        system += second_moment(weight)
        right += weight.double().T @ (original.double() @ columns)
    return _solve(_ridge(system, reg), right, f"raise reg (now {reg:g})").T


def preimage_under(change: Change, moment: Tensor, rows: Tensor, reg: float) -> Tensor:
    """`preimage` of rows [n, d] when every edited layer is its original one times T = I + D, W_l = W0_l T:

        c' = (reg I + T^T M T)^{-1} T^T M c,   M = sum_l W0_l^T W0_l [d, d] float64, computed once for any number of changes.

    Returns [n, d], float64.
    """
    answered = torch.addmm(moment, moment @ change.u, change.v)  # M T
    system = torch.addmm(answered, change.v.T, change.u.T @ answered)
    return _solve(_ridge(system, reg), answered.T @ rows.double().T, f"raise reg (now {reg:g})").T


def shares(moments: Sequence[Tensor], keep: Tensor, lamb: float) -> list[Tensor]:
    """What of each of several changes dW_k belongs into their fusion W + sum_k dW_k R_k: R_k [d, d] that minimise

        sum_k ||(W' - W - dW_k) C_k||_F^2 + tr((W' - W) M (W' - W)^T) + lamb ||W' - W||_F^2

    for every weight W and its changes at once, R_k = S_k (lamb I + M + sum_k S_k)^{-1} with S_k = C_k C_k^T.

    moments S_k: [d, d], of the rows on which the k-th change should hold. keep M: [d, d], of rows to keep. Both float64.
    """
    if not 0 <= lamb < float("inf"):
        raise UserError(f"lamb is {lamb}, needs a number of at least 0; give such a weight")
    system = _ridge(torch.stack([keep, *moments]).sum(0), lamb)
    solved = _solve(system, torch.cat(list(moments), 1), f"raise lamb (now {lamb:g})")
    return [part.T for part in solved.split(len(keep), 1)]


def exact(rows: Tensor, keep: Tensor, lamb: float, tolerance: float) -> Tensor:
    """R [m, d] such that W' = W + V R gives V [o, m] more than W at the rows, (W' - W) c_i = v_i, and changes as little else as
    it can: of all such W' it has the least tr((W' - W) (M + lamb I) (W' - W)^T). R = (C A^{-1} C^T)^{-1} C A^{-1}, A = M + lamb I.

    rows C: [m, d]. keep M: [d, d] float64, of rows to keep. tolerance: directions of the rows, measured in A^{-1}, that are
    smaller than this part of the largest are taken for rounding, so that rows given twice count once; at those V is met as
    nearly as can be. Source: Custom Diffusion (arXiv 2212.04488), its closed-form merge.
    """
    if not 0 <= lamb < float("inf"):
        raise UserError(f"lamb is {lamb}, needs a number of at least 0; give such a weight")
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance is {tolerance}, needs a number between 0 and 1; give such a part")
    factor = _cholesky(_ridge(keep.clone(), lamb), f"raise lamb (now {lamb:g})")
    whitened = torch.linalg.solve_triangular(factor, rows.double().T, upper=False)  # L^{-1} C^T with A = L L^T
    return torch.linalg.solve_triangular(factor.T, torch.linalg.pinv(whitened.T, rtol=tolerance), upper=True).T


def joint_weight(weights: Iterable[Tensor]) -> Tensor:
    """One H [d, d] that stands for all layers in a least-squares problem: H^T H = sum_l W_l^T W_l.

    When every layer is W0_l T with the same T, sum_l ||W_l x - W0_l c||^2 = ||H T x - H c||^2.
    Its rows are the right singular vectors of all layers stacked, times their singular values, from the smallest on.
    """
    values, vectors = torch.linalg.eigh(moment_of(weights))
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _shift(source: Tensor, target: Tensor) -> Tensor:
    """sum_i c_i (g_i - c_i)^T [d, d] in float64, without a float64 copy of all rows."""
    total = torch.zeros(source.shape[1], source.shape[1], dtype=torch.float64, device=source.device)
    for rows, goals in zip(source.split(_BLOCK), target.split(_BLOCK), strict=True):
        total.addmm_(rows.double().T, goals.double() - rows.double())
    return total


def second_moment(rows: Tensor) -> Tensor:
    """sum_i x_i x_i^T [d, d] in float64, without a float64 copy of all rows."""
    return moment_of(rows.split(_BLOCK))


def moment_of(parts: Iterable[Tensor]) -> Tensor:
    """sum_l W_l^T W_l [d, d] in float64 of matrices W_l [o_l, d], at least one. Only one triangle is computed."""
    total = None
    for part in parts:
        width, part = part.shape[1], part.double()
        total = part.new_zeros(width, width) if total is None else total
        for first in range(0, width, _COLUMNS):
            last = first + _COLUMNS
            total[first:last, first:].addmm_(part[:, first:last].T, part[:, first:])
    assert total is not None
    return total.triu() + total.triu(1).T


def _ridge(system: Tensor, lamb: float) -> Tensor:
    """system + lamb I, in place."""
    system.diagonal().add_(lamb)
    return system


def _solve(system: Tensor, right: Tensor, cure: str) -> Tensor:
    """system^{-1} right for a symmetric positive definite system; a singular one is a UserError that says `cure`."""
    return torch.cholesky_solve(right, _cholesky(system, cure))


def _cholesky(system: Tensor, cure: str) -> Tensor:
    """The lower factor of a symmetric positive definite system; a singular one is a UserError that says `cure`."""
    if not system.isfinite().all():
        raise UserError("the text embeddings or weights are not finite numbers; load the model in float32")
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal()
    # The squared ratio of the pivots tells a good condition number at no cost; only a doubtful one is worth computing.
    if failed or (pivots.min() / pivots.max()) ** 2 < _DOUBTFUL:
        values = torch.linalg.eigvalsh(system)
        condition = float(values[-1] / values[0]) if values[0] > 0 else float("inf")
        if failed or condition > _SINGULAR:
            raise UserError(f"the closed-form system is singular (condition number {condition:.1e}); {cure}")
    return factor
