"""Muon, with a choice of the number format that it computes in."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon without weight decay (Jordan et al. 2024), as in ``torch.optim.Muon``.

    torch's own always computes in bfloat16. A CPU without instructions for it takes ten minutes for
    a step of 135 million parameters, and seconds in float32.

    Args:
        matrices: the parameters, each of two dimensions.
        lr: learning rate; an update's root mean square is 0.2 times it, that of AdamW (Liu et al.
            2025, section 2.2; ``match_rms_adamw`` in torch).
        precision: number format of ``orthogonalize``.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, precision: torch.dtype) -> None:
        super().__init__(matrices, {"lr": lr})
        self._precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient; it takes no closure."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonalize(matrix.grad.lerp(average, MOMENTUM), self._precision)
                rate = group["lr"] * 0.2 * math.sqrt(max(matrix.shape))
                matrix.add_(update, alpha=-rate)


def orthogonalize(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """Bring the singular values of a matrix near one, by five Newton-Schulz iterations.

    Args:
        matrix: [rows, columns]
        precision: number format of the products, and of what is returned.

    Returns:
        [rows, columns], with singular values between 0.5 and 1.5, but for very small ones.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(precision)
    x = x.T if tall else x  # the products with itself are the smaller ones
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
