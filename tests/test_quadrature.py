import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import integrate as scipy_integrate
from scipy.stats import norm

from normprop.activations.activation_moments import activation_moments
from normprop.activations.breakpoints import Breakpoints, find_breakpoints
from normprop.activations.quadrature import integrate

FUNCTIONS = {
    "two pieces": lambda x: torch.where(x > 1, x.square(), -x),
    "kink": lambda x: (x - 0.1).abs(),
    "dip": lambda x: torch.where(x.abs() < 0.3, x.cos(), 1 + 0.1 * x),
    "bump": lambda x: torch.exp(-((x - 2) ** 2) * 4),
    "steep": lambda x: torch.tanh(30 * x),
    "quantiser": lambda x: (4 * x).round().clamp(-7, 7) / 4,
    "relu6 by hand": lambda x: x.clamp(0, 6),
    "square root": lambda x: x.clamp(min=0).sqrt(),
    "lisht": lambda x: x * torch.tanh(x),
    "sine": torch.sin,
    "bessel": torch.special.bessel_j0,
}
GAUSSIANS = [(0.0, 1.0), (1.0, 0.2), (-2.0, 3.0), (0.1, 0.01)]


def double(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def scipy_oracle(f, mean, std, breakpoints):
    """Adaptive quadrature by QUADPACK between the kinks."""
    ends = sorted({-12.0, *((k - mean) / std for k in breakpoints if abs(k - mean) < 12 * std), *range(-11, 12), 12.0})
    g = lambda z: float(f(double(mean + std * z)))
    total = lambda h: sum(
        scipy_integrate.quad(h, a, b, epsabs=1e-14, epsrel=1e-12, limit=200)[0] for a, b in itertools.pairwise(ends)
    )
    first = total(lambda z: g(z) * norm.pdf(z))
    return first, total(lambda z: (g(z) - first) ** 2 * norm.pdf(z)), total(lambda z: g(z) ** 2 * norm.pdf(z))


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "square root"])
def test_integrate_against_quadpack_within_its_own_error(name):
    f = FUNCTIONS[name]
    points = find_breakpoints(f, -40.0, 40.0)
    known = (-0.3, 0.0, 0.1, 0.3, 1.0, 2.0, 6.0, *(i / 8 for i in range(-15, 16, 2)))
    for mean, std in GAUSSIANS:
        result = integrate(f, double(mean), double(std), points)
        for value, true in zip(result[:3], scipy_oracle(f, mean, std, known), strict=True):
            assert abs(value.item() - true) <= max(1e-9 * abs(true), 1e-12), (mean, std)
            assert abs(value.item() - true) <= result.error.item() + 1e-10 * abs(true) + 1e-12, (mean, std)


def test_square_root_has_no_finite_slope_and_says_so():
    result = integrate(FUNCTIONS["square root"], double(0.0), double(1.0), find_breakpoints(FUNCTIONS["square root"]))
    assert result.mean.item() == pytest.approx(2**-0.75 * math.gamma(0.75) / math.sqrt(math.pi), rel=1e-9)
    assert result.error > 1e-3


@pytest.mark.parametrize(
    ("name", "kinks"),
    [
        ("relu", [0.0]),
        ("relu6", [0.0, 6.0]),
        ("hardtanh", [-1.0, 1.0]),
        ("softshrink", [-0.5, 0.5]),
        ("hardswish", [-3.0, 3.0]),
    ],
)
def test_kinks_are_found_to_the_last_digit(name, kinks):
    points = find_breakpoints(getattr(F, name))
    assert set(kinks) <= set(points.edges)
    assert points.resolved
    assert points.jumps == ()


# Closer to 0 than this a point is told from 0 only by its distance, not by its digits.
@given(st.floats(-50, 50).filter(lambda k: k == 0 or abs(k) > 1e-3))
@example(0.2730563965604915)  # the very middle of a narrow panel
@settings(max_examples=30, deadline=None)
def test_any_kink_and_any_jump_is_found(k):
    kink = find_breakpoints(lambda x: (x - k).abs())
    jump = find_breakpoints(lambda x: (x > k).double())
    near = 1e-14 * max(1.0, abs(k))
    assert min(abs(edge - k) for edge in kink.edges) <= near
    assert len(jump.jumps) == 1
    assert abs(jump.jumps[0] - k) <= near


@pytest.mark.parametrize("f", [torch.tanh, F.gelu, F.silu, F.softplus, F.mish, torch.exp, F.softsign, F.elu, torch.atan])
def test_no_false_alarm_for_continuous_functions(f):
    points = find_breakpoints(f)
    assert points.resolved
    assert points.jumps == ()


def test_jumps_at_every_integer():
    points = find_breakpoints(torch.floor, -9.5, 9.5)
    assert points.jumps == tuple(float(k) for k in range(-9, 10))
    result = integrate(torch.floor, double(0.0), double(1.0), points)
    assert result.mean.item() == pytest.approx(-0.5, abs=1e-12)
    assert result.slope.item() == math.inf
    # E floor(u + m) grows by 1 when m does, evenly but for e^{−2π²}.
    assert result.mean_slope.item() == pytest.approx(1.0, abs=1e-7)


def test_too_many_jumps_are_admitted():
    points = find_breakpoints(torch.frac, -1e4, 1e4)
    assert not points.resolved


@pytest.mark.parametrize("name", ["relu", "hardtanh", "hardswish", "softshrink", "gelu", "silu", "elu"])
def test_generic_quadrature_agrees_with_the_known_form(name):
    mean = torch.tensor([-3.0, 0.0, 0.2, 50.0], dtype=torch.float64)
    std = torch.tensor([1.0, 1e-3, 5.0, 1e-3], dtype=torch.float64)
    generic = integrate(getattr(F, name), mean, std, find_breakpoints(getattr(F, name)))
    known = activation_moments(name, mean, std)
    for field in ("mean", "var", "second", "slope", "mean_slope"):
        torch.testing.assert_close(getattr(generic, field), getattr(known, field), rtol=1e-10, atol=1e-14)


def test_derivatives_through_kinks_and_jumps():
    for name in ("two pieces", "kink", "quantiser"):
        f = FUNCTIONS[name]
        points = find_breakpoints(f, -60.0, 60.0)
        mean = torch.tensor([0.3, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
        std = torch.tensor([0.7, 1.0, 1.3], dtype=torch.float64, requires_grad=True)
        pick = lambda m, s, f=f, points=points: integrate(f, m, s, points)[:3]
        assert torch.autograd.gradcheck(pick, (mean, std))
        assert torch.autograd.gradgradcheck(pick, (mean, std))
        result = integrate(f, mean, std, points)
        (by_mean,) = torch.autograd.grad(result.mean.sum(), mean)
        torch.testing.assert_close(by_mean, result.mean_slope, rtol=1e-8, atol=1e-10)


def test_learned_parameters_of_a_callable_get_gradients():
    knee = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def numbers(k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return integrate(lambda x: 0.3 * torch.relu(x - k), double(0.2), double(1.1), points)[:3]

    points = find_breakpoints(lambda x: 0.3 * torch.relu(x - 0.4))
    values = numbers(knee)
    shifted = activation_moments("relu", double(0.2) - knee, double(1.1))
    for value, true in zip(values, (0.3 * shifted.mean, 0.09 * shifted.var, 0.09 * shifted.second), strict=True):
        (ours,) = torch.autograd.grad(value, knee, retain_graph=True)
        (theirs,) = torch.autograd.grad(true, knee, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


# torch.compile imports modules of torch that call what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_integrate_compiles_whole_and_maps():
    points = find_breakpoints(FUNCTIONS["two pieces"])
    f = lambda m, s: integrate(FUNCTIONS["two pieces"], m, s, points)[:5]
    mean, std = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(mean, std)
    mapped = torch.func.vmap(f)(mean, std)
    for a, b, c in zip(f(mean, std), compiled, mapped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-15)


def test_integrate_needs_no_more_than_two_edges():
    result = integrate(lambda x: 2 * x + 1, double(0.5), double(2.0), Breakpoints((-1.0, 1.0)))
    torch.testing.assert_close(torch.stack(result[:5]), torch.tensor([2.0, 16.0, 20.0, 4.0, 2.0], dtype=torch.float64))
