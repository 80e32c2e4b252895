from __future__ import annotations

import pytest
import torch
from torch import Tensor

import normprop.effective
from normprop.effective import EffectiveWeight


def slow(rows: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, shift: Tensor, scale: Tensor, center: bool):
    """METHOD §3 a filter at a time, in the plainest operations."""
    weights, biases = [], []
    for group in range(rows.shape[0]):
        for o in range(rows.shape[1]):
            w = rows[group, o] - rows[group, o].mean() if center else rows[group, o]
            first, second = (w * mean[group]).sum(), (w**2 * var[group]).sum()
            factor = gamma[group, o] / torch.sqrt(scale[group, o] * second)
            weights.append(w * factor)
            biases.append(beta[group, o] - (first + shift[group, o]) * factor)
    return torch.stack(weights).reshape(rows.shape), torch.stack(biases).reshape(gamma.shape)


def arguments(groups: int, filters: int, fan_in: int) -> list[Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(groups, filters, fan_in, dtype=torch.float64) + 0.3
    mean = torch.randn(groups, fan_in, dtype=torch.float64)
    var = torch.rand(groups, fan_in, dtype=torch.float64) + 0.1
    gamma, beta, shift = (torch.randn(groups, filters, dtype=torch.float64) for _ in range(3))
    inputs = [rows, mean, var, gamma, beta]
    return [*(t.requires_grad_() for t in inputs), shift, torch.rand(groups, filters, dtype=torch.float64) + 0.5]


def fast(*inputs: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    return EffectiveWeight.apply(*inputs, center)[:2]


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", [(1, 6, 10), (3, 2, 4), (1, 40, 50)], ids=str)
def test_fast_is_slow_in_value_and_gradient(
    shape: tuple[int, int, int], center: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normprop.effective, "_BLOCK", 300)  # several blocks
    inputs = arguments(*shape)
    found, expected = fast(*inputs, center=center), slow(*inputs, center)
    weights = [torch.randn_like(t) for t in expected]
    gradients = [torch.autograd.grad(out, inputs[:5], weights) for out in (found, expected)]
    for a, b in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("center", [True, False])
def test_first_and_second_derivatives(center: bool) -> None:
    inputs = arguments(2, 3, 4)
    function = lambda *free: fast(*free, *inputs[5:], center=center)
    assert torch.autograd.gradcheck(function, inputs[:5])
    assert torch.autograd.gradgradcheck(function, inputs[:5])


def test_vmap_over_weights() -> None:
    inputs = arguments(1, 3, 4)
    rows = torch.randn(5, 1, 3, 4, dtype=torch.float64)
    total = lambda r: sum(t.square().sum() for t in fast(r, *inputs[1:], center=True))
    together = torch.func.vmap(torch.func.grad(total))(rows)
    for one, r in zip(together, rows, strict=True):
        torch.testing.assert_close(one, torch.func.grad(total)(r))


def test_a_filter_of_zeros_has_finite_gradients() -> None:
    inputs = arguments(1, 3, 4)
    with torch.no_grad():
        inputs[0][0, 0] = 0.0
        inputs[0][0, 1] = 0.7  # zero once it is centred
    out = fast(*inputs, center=True)
    gradients = torch.autograd.grad(sum(t.square().sum() for t in out), inputs[:5])
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
