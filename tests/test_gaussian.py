import math

import mpmath
import pytest
import torch

from normprop.activations.normal import density, gauss_legendre, half_moments, tail_moments
from normprop.errors import NormPropError

T = [0.0, 1e-9, 1e-3, 0.3, 1.0, 2.5, 3.0, 5.0, 8.0, 13.0, 21.0, 30.0, 36.0]


def oracle(n: int, t: float) -> mpmath.mpf:
    """n! φ(t) e^{t²/4} D_{−n−1}(t), DLMF 12.5.1."""
    t = mpmath.mpf(t)
    return mpmath.factorial(n) * mpmath.npdf(t) * mpmath.exp(t * t / 4) * mpmath.pcfd(-n - 1, t)


@pytest.mark.parametrize("order", [0, 2, 4, 6])
def test_tail_moments_against_parabolic_cylinder_functions(order):
    values = tail_moments(torch.tensor(T, dtype=torch.float64), order)
    assert values.shape == (order + 1, len(T))
    with mpmath.workdps(50):
        for n in range(order + 1):
            for t, value in zip(T, values[n].tolist(), strict=True):
                assert abs(mpmath.mpf(value) / oracle(n, t) - 1) < 5e-13, (n, t)


def test_tail_moments_end_in_zero_not_nan():
    t = torch.tensor([40.0, 1e3, 1e300, math.inf], dtype=torch.float64)
    values = tail_moments(t, 4)
    assert values.isfinite().all()
    assert (values[:, 1:] == 0).all()


def test_tail_moments_derivative_is_the_order_below():
    t = torch.linspace(0.01, 12, 50, dtype=torch.float64, requires_grad=True)
    values = tail_moments(t, 3)
    for n in range(4):
        (slope,) = torch.autograd.grad(values[n].sum(), t, retain_graph=True)
        expected = -density(t) if n == 0 else -n * values[n - 1]
        torch.testing.assert_close(slope, expected, rtol=1e-10, atol=0)


def test_tail_moments_second_derivative():
    t = torch.linspace(0.01, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: tail_moments(x, 2), t)


def test_tail_moments_of_too_high_order():
    with pytest.raises(NormPropError, match="order 6"):
        tail_moments(torch.zeros(()), 7)


def test_half_moments_are_tail_moments_at_zero():
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(half_moments(6, zero), tail_moments(zero, 6), rtol=1e-13, atol=0)


@pytest.mark.parametrize("count", [4, 7, 10, 16, 24])
def test_gauss_legendre_is_exact_up_to_twice_its_order(count):
    nodes, weights = gauss_legendre(count, torch.zeros((), dtype=torch.float64))
    for power in range(2 * count):
        assert float((weights * nodes**power).sum()) == pytest.approx(1 / (power + 1), rel=1e-14)
