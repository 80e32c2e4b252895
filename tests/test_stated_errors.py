"""The error that moments state is an upper bound, whatever the function hides: narrow, fast, jumping, out of sight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, wofz
from torch import Tensor

from normprop.activations.activation_moments import moments
from normprop.activations.crossings import find_crossings

Exact = tuple[float, float | None]  # E f, and E f² where it is known


class OutOfSight(torch.autograd.Function):
    """A bell computed by another library."""

    @staticmethod
    def forward(u: Tensor, center: float, width: float) -> Tensor:
        import numpy as np

        return torch.as_tensor(np.exp(-(((u.detach().numpy() - center) / width) ** 2)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.center, ctx.width = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        u, y = ctx.saved_tensors
        return grad * y * (-2 * (u - ctx.center) / ctx.width**2), None, None


def bell_moments(c: float, w: float, m: float, s: float) -> Exact:
    """∫ e^{−k((u−c)/w)²} p(u) du for k = 1, 2."""
    first, second = (
        v / math.hypot(v, math.sqrt(2) * s) * math.exp(-((m - c) ** 2) / (v * v + 2 * s * s)) for v in (w, w / math.sqrt(2))
    )
    return first, second


def pulse_moments(c: float, w: float, m: float, s: float) -> Exact:
    low, high = (c - w - m) / s, (c + w - m) / s
    if low > 0:
        low, high = -high, -low
    share = float(ndtr(high) - ndtr(low))
    return share, share


def wave_moments(k: float, phase: float, m: float, s: float) -> Exact:
    damped = lambda n: math.exp(-((n * k * s) ** 2) / 2) * math.cos(n * (k * m + phase))
    return damped(1), 0.5 + 0.5 * damped(2)


def square_wave_moments(k: float, phase: float, m: float, s: float) -> Exact:
    """By the Fourier series."""
    odd = range(1, 4001, 2)
    terms = (math.exp(-((n * k * s) ** 2) / 2) * math.sin(n * (k * m + phase)) / n for n in odd if n * k * s < 38)
    return 4 / math.pi * math.fsum(terms), 1.0


# Around a place c in units of w.
NARROW: dict[str, tuple[Callable[[float, float], Callable[[Tensor], Tensor]], Callable[..., Exact]]] = {
    "bell": (lambda c, w: lambda u: torch.exp(-((u - c) / w).square()), bell_moments),
    "bell by another library": (lambda c, w: lambda u: OutOfSight.apply(u, c, w), bell_moments),
    "step": (
        lambda c, w: lambda u: torch.special.ndtr((u - c) / w),
        lambda c, w, m, s: (float(ndtr((m - c) / math.hypot(s, w))), None),
    ),
    "pulse": (lambda c, w: lambda u: torch.where((u > c - w) & (u < c + w), 1.0, 0.0), pulse_moments),
    "resonance": (  # the Voigt profile
        lambda c, w: lambda u: 1 / (1 + ((u - c) / w).square()),
        lambda c, w, m, s: (math.sqrt(math.pi / 2) * w / s * wofz(complex(c - m, w) / (s * math.sqrt(2))).real, None),
    ),
}
FAST: dict[str, tuple[Callable[[float, float], Callable[[Tensor], Tensor]], Callable[..., Exact]]] = {
    "wave": (lambda k, phase: lambda u: torch.cos(k * u + phase), wave_moments),
    "square wave": (lambda k, phase: lambda u: torch.sign(torch.sin(k * u + phase)), square_wave_moments),
}


def check(function: Callable[[Tensor], Tensor], exact: Exact, mean: float, std: float) -> None:
    found = moments(function, mean, std)
    first, second = exact
    error = found.error.item() + 1e-15  # of the oracle
    assert abs(found.mean.item() - first) <= error
    if second is not None:
        assert abs(found.second.item() - second) <= error
        assert abs(found.var.item() - (second - first * first)) <= error


magnitudes = st.floats(-2, 2).map(lambda x: 10.0**x)


@pytest.mark.parametrize("name", NARROW)
@given(mean=st.floats(-100, 100), std=magnitudes, away=st.floats(-3, 3), width=st.floats(-7, 1))
@settings(max_examples=15)
def test_narrow_features(name: str, mean: float, std: float, away: float, width: float) -> None:
    function, exact = NARROW[name]
    place, size = mean + away * std, std * 10.0**width
    check(function(place, size), exact(place, size, mean, std), mean, std)


@pytest.mark.parametrize("name", FAST)
@given(mean=st.floats(-3, 3), std=magnitudes, frequency=st.floats(-1, 2.7), phase=st.floats(0, 6))
@settings(max_examples=5)
def test_fast_oscillation(name: str, mean: float, std: float, frequency: float, phase: float) -> None:
    function, exact = FAST[name]
    k = 10.0**frequency / std
    check(function(k, phase), exact(k, phase, mean, std), mean, std)


def test_the_variance_has_an_error_of_its_own() -> None:
    """It comes from the slopes, which panels of a fixed order resolve less well than values."""
    function = lambda u: torch.nn.functional.elu(2.598 * torch.tanh(345.455 * (u - 1.176278777)) + 0.2909)
    mean, std = torch.tensor(0.51998, dtype=torch.float64), torch.tensor(1.4822, dtype=torch.float64)
    found = moments(function, mean, std)
    by_values = found.second - found.mean.square()
    assert 1e-12 < abs(found.var - by_values) <= found.error


def test_what_oscillates_too_fast_says_so() -> None:
    found = moments(lambda u: torch.cos(1e5 * u))
    assert abs(found.mean.item()) <= found.error.item()
    assert abs(found.second.item() - 0.5) <= found.error.item()
    assert found.error.item() > 1e-3


def test_what_is_out_of_sight_says_so() -> None:
    assert moments(lambda u: OutOfSight.apply(u, 0.0, 1.0)).error.item() > 1e-4
    assert moments(lambda u: torch.exp(-u.square())).error.item() < 1e-10


@given(mean=st.floats(-5, 5), std=st.floats(0.1, 5))
@settings(max_examples=20)
def test_rounding_of_single_precision_is_part_of_the_error(mean: float, std: float) -> None:
    for function in ("relu", "gelu", "exp", lambda u: torch.tanh(u) * u):
        m, s = torch.tensor(mean), torch.tensor(std)
        low, high = moments(function, m, s), moments(function, m.double(), s.double())
        for field in ("mean", "var", "second", "slope"):
            assert abs(getattr(low, field).double() - getattr(high, field)) <= low.error


def test_rounding_in_a_function_is_part_of_the_error() -> None:
    single = moments(lambda u: torch.nn.functional.silu(torch.where(u > 0, 0.1, 0.7)))  # numbers in the default precision
    double = moments(lambda u: torch.nn.functional.silu(0.7 - 0.6 * (u > 0).to(u)))
    assert 1e-10 < abs(single.mean - double.mean) <= single.error
    assert double.error < 1e-12


@given(place=st.floats(-1e6, 1e6), width=st.floats(-6, 3), far=st.floats(1, 100))
@settings(max_examples=12)
def test_numbers_inside_a_function_are_found_where_they_act(place: float, width: float, far: float) -> None:
    """Of an affine map followed by something that bends, to the last digits."""
    w = 10.0**width * max(1.0, abs(place))
    inside = lambda u: (u - place) / w
    cases: list[tuple[Callable[[Tensor], Tensor], list[float]]] = [
        (lambda u: torch.relu(inside(u)), [place]),
        (lambda u: inside(u).clamp(-far, far), [place - far * w, place + far * w]),
        (lambda u: torch.where(inside(u) > far, 1.0, u), [place + far * w]),
        (lambda u: torch.exp(-inside(u).square()), [place, place - w, place + w]),
        (lambda u: torch.sigmoid(torch.relu(inside(u)) - far), [place, place + far * w]),
    ]
    for function, expected in cases:
        found = find_crossings(function, -1e12, 1e12)
        assert found.seen
        for x in expected:
            assert min(abs(p - x) for p in found.points) <= 1e-12 * (abs(place) + far * w)
