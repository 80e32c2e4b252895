from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor, nn

from normprop import Moments
from normprop.activations.activation_moments import activation_moments
from normprop.activations.compiled_rectifiers import native_rectified
from normprop.activations.rectifier_moments import rectified_moments
from normprop.native.library import library
from normprop.rules.elementwise import module_activation

Rectify = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
SLOPES = (0.0, 0.01, 0.3, 1.0, -0.5)


def native(mean: Tensor, var: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """The compiled function, on this pair and another one together."""
    if isinstance(library(), str):
        pytest.skip(str(library()))
    return native_rectified([mean.detach() + 1, mean], [var.detach() + 1, var], slope)[1]


BOTH = pytest.mark.parametrize("rectify", [rectified_moments, native])


def grid() -> tuple[Tensor, Tensor]:
    mean = torch.tensor([-300.0, -5.0, -1.3, -1e-3, 0.0, 0.2, 1.0, 7.0, 40.0, 1000.0], dtype=torch.float64)
    std = torch.tensor([1e-2, 0.7, 1.0, 3.0, 200.0], dtype=torch.float64)
    return mean[:, None].expand(10, 5).reshape(-1), std[None].square().expand(10, 5).reshape(-1)


@BOTH
@pytest.mark.parametrize("slope", SLOPES)
def test_it_gives_what_the_general_engine_gives(slope: float, rectify: Rectify) -> None:
    mean, var = (t.clone().requires_grad_() for t in grid())
    found = rectify(mean, var, slope)
    general = activation_moments("leaky_relu", mean, var.sqrt(), negative_slope=slope)
    inputs = (mean.square() + var).detach()  # rounding of the input is what either can be held to
    for a, b, scale in zip(found, (general.mean, general.var), (inputs.sqrt(), var.detach()), strict=True):
        assert float(((a - b).detach().abs() / scale).max()) < 1e-12
        weights = torch.linspace(0.5, 2.0, len(mean), dtype=torch.float64)
        for mine, theirs in zip(
            torch.autograd.grad(a, (mean, var), weights, retain_graph=True),
            torch.autograd.grad(b, (mean, var), weights, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize("slope", SLOPES)
def test_first_and_second_derivatives(slope: float, rectify: Rectify) -> None:
    mean = torch.tensor([-1.5, 0.0, 0.4, 3.0], dtype=torch.float64, requires_grad=True)
    var = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    function = lambda m, v: rectify(m, v, slope)
    assert torch.autograd.gradcheck(function, (mean, var))
    assert torch.autograd.gradgradcheck(function, (mean, var))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_variance(dtype: torch.dtype, rectify: Rectify) -> None:
    mean = torch.tensor([-2.0, 0.0, 2.0], dtype=dtype, requires_grad=True)
    var = torch.zeros(3, dtype=dtype, requires_grad=True)
    first, second = rectify(mean, var, 0.1)
    torch.testing.assert_close(first, torch.tensor([-0.2, 0.0, 2.0], dtype=dtype))
    assert float(second.abs().max().detach()) == 0.0
    gradients = torch.autograd.grad((first + second).sum(), (mean, var))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


@BOTH
def test_no_digits_are_lost_far_below_zero(rectify: Rectify) -> None:
    """Mean and variance to their own size, which shrinks with φ(t), and so do their derivatives."""
    std = 0.7
    distances = [0.0, 0.3, 1.0, 2.9, 3.0, 3.1, 4.0, 6.0, 9.0, 14.0, 21.0, 30.0, 36.0]
    mean = torch.tensor([-t * std for t in distances], dtype=torch.float64, requires_grad=True)
    var = torch.full_like(mean, std * std).requires_grad_()
    first, second = rectify(mean, var, 0.0)
    slopes = [torch.autograd.grad(x.sum(), (mean, var), retain_graph=True) for x in (first, second)]
    with mpmath.workdps(700):
        for i, m in enumerate(mean.tolist()):
            s, t = mpmath.mpf(std), mpmath.mpf(m) / mpmath.mpf(std)
            below, density = mpmath.erfc(-t / mpmath.sqrt(2)) / 2, mpmath.npdf(t)
            h = s * (t * below + density)
            found = [
                first.detach()[i],
                second.detach()[i],
                slopes[0][0][i],
                slopes[0][1][i],
                slopes[1][0][i],
                slopes[1][1][i],
            ]
            square = s * t * h + s * s * below
            exact = [h, square - h * h, below, density / 2 / s, 2 * h * (1 - below), below - h * density / s]
            for value, x in zip(found, exact, strict=True):
                assert abs(mpmath.mpf(float(value)) / x - 1) < 1e-12, (m, float(value), mpmath.nstr(x))


def test_vmap() -> None:
    mean, var = torch.randn(4, 3), torch.rand(3) + 0.1
    total = lambda m: sum(t.sum() for t in rectified_moments(m, var, 0.2))
    together = torch.func.vmap(torch.func.grad(total))(mean)
    for row, m in zip(together, mean, strict=True):
        torch.testing.assert_close(row, torch.func.grad(total)(m))


def test_the_rule_uses_the_modules_slope() -> None:
    x = Moments(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1))
    for module, slope in ((nn.ReLU(), 0.0), (nn.LeakyReLU(0.3), 0.3)):
        expected = activation_moments("leaky_relu", 0.0, 1.0, negative_slope=slope)
        assert float(module_activation(module, x).var.mean()) == pytest.approx(float(expected.var), rel=1e-6)
