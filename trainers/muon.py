"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose matrices are orthogonalised before the step.

Matrices and convolution kernels (as [out, in x h x w] matrices) take orthogonalised steps; vectors and whatever else the
caller names take AdamW's. torch.optim.Muon accepts matrices only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration that drives singular values to about 1


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values end between about 0.7 and 1.2.

    The iteration runs on the Gram matrix of the shorter side, and its product is applied once: a third of the work where
    matrices are long, as convolution kernels are.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    product = eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        factor = a * eye + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Muon for the hidden matrices of a module, AdamW for the rest; one learning rate for both.

    Orthogonalised steps are scaled to the root mean square of an AdamW step (0.2 sqrt(max(m, n)); Liu et al. 2025,
    arXiv 2502.16982, equation 4), so that AdamW's learning rates carry over. outer: prefixes of parameters that AdamW keeps:
    the first and last layers and embeddings.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        outer: tuple[str, ...] = (),
    ) -> None:
        hidden, rest = [], []
        for name, parameter in named:
            (hidden if parameter.ndim >= 2 and not name.startswith(outer) else rest).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": part, "orthogonal": orthogonal} for part, orthogonal in ((hidden, True), (rest, False)) if part
        ]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    move = self._muon if group["orthogonal"] else self._adam
                    parameter.add_(move(parameter, parameter.grad, group), alpha=-group["lr"])

    def _muon(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        mean = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        step = orthogonalise(gradient.lerp(mean, group["momentum"]).flatten(1))  # Nesterov
        return step.view_as(parameter) * (0.2 * math.sqrt(max(step.shape)))

    def _adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = group["betas"]
        mean = state["mean"].lerp_(gradient, 1 - first) / (1 - first ** state["step"].item())
        square = state["square"].lerp_(gradient.square(), 1 - second) / (1 - second ** state["step"].item())
        return mean / (square.sqrt() + 1e-8)
