"""Muon against torch's, and its iteration against singular values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from research_agent.muon import Muon, orthogonalize

SHAPES = [(4, 4), (3, 8), (8, 3), (1, 5)]


def _steps(optimizer: torch.optim.Optimizer, matrices: list[Tensor]) -> None:
    """Make three steps with gradients that depend on the weights; the rate changes once."""
    for step in range(3):
        optimizer.zero_grad()
        torch.stack([(matrix**3).sum() for matrix in matrices]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = 0.1 if step else 0.05
        optimizer.step()


def _matrices() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in SHAPES]


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.0), ("float32", 0.02)])
def test_steps_equal_those_of_torch(precision: str, tolerance: float) -> None:
    ours, torchs = _matrices(), _matrices()
    _steps(Muon(ours, 0.1, getattr(torch, precision)), ours)
    reference = torch.optim.Muon(torchs, 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    _steps(reference, torchs)
    for mine, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    diagonal = left.T @ orthogonalize(matrix, torch.float64) @ right.T
    values = diagonal.diagonal()
    assert ((values > 0.5) & (values < 1.5)).all()
    torch.testing.assert_close(diagonal, values.diag(), rtol=0, atol=1e-12)


def test_a_value_worked_by_hand() -> None:
    # One number, x / |x| = 1 at first: each iteration makes it 3.4445 x - 4.775 x^3 + 2.0315 x^5.
    x = 1.0
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    found = orthogonalize(torch.tensor([[-7.0]], dtype=torch.float64), torch.float64)
    assert found.item() == pytest.approx(-x)


def test_a_matrix_without_gradient_is_left_alone() -> None:
    used, unused = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    optimizer = Muon([used, unused], 0.1, torch.float32)
    used.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert (used != 1).all()
    assert (unused == 1).all()
