from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import normprop
from normprop import Moments
from normprop.activations.activation_moments import activation_moments
from normprop.activations.fast_moments import lane_moments, mean_square_slope
from normprop.activations.panels import SINGLE, lane_panels
from normprop.activations.piecewise import Piecewise
from normprop.conversion.program_calls import composed_activations
from normprop.precision import working_dtype
from normprop.rules.composed import _known
from normprop.rules.elementwise import module_activation, named_activation

QUICK: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("silu", "gelu", "mish", "sigmoid", "tanh", "softplus", "logsigmoid", "elu", "selu", "celu")),
    *((name, {}) for name in ("erf", "erfc", "tanhshrink", "hardswish", "relu6", "hardtanh", "hardsigmoid", "softshrink")),
    *((name, {}) for name in ("abs", "rrelu")),
    ("gelu", {"approximate": "tanh"}),
    ("elu", {"alpha": 0.5}),
    ("celu", {"alpha": 0.3}),
    ("softplus", {"beta": 3.0}),
    ("clamp", {"min": -0.5}),
    ("clamp_max", {"max": 2.0}),
    ("hardtanh", {"min_val": -3.0, "max_val": 0.01}),
]
# Those that the function does not take: learned, without bend or slow to straighten, with jumps, with a closed form.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("prelu", {"weight": torch.tensor(0.2)}),
    ("square", {}),
    ("softsign", {}),
    ("hardshrink", {}),
    ("exp", {}),
]


def title(case: tuple[str, dict[str, Any]]) -> str:
    return " ".join([case[0], *(f"{k}={float(v) if k == 'weight' else v}" for k, v in case[1].items())])


def grid(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means and variances, leaves."""
    size = torch.logspace(-3, 3, 13, dtype=torch.float64)
    mean = torch.cat([-size.flip(0), torch.zeros(1, dtype=torch.float64), size])[:, None]
    std = torch.logspace(-3, 3, 17, dtype=torch.float64)[None]
    both = torch.broadcast_tensors(mean, std.square())
    return both[0].reshape(-1).to(dtype).requires_grad_(), both[1].reshape(-1).to(dtype).requires_grad_()


def with_gradients(mean: Tensor, var: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
    """E and Var, then their derivatives by mean and var."""
    derivatives = [d for x in (first, second) for d in torch.autograd.grad(x.sum(), (mean, var), retain_graph=True)]
    return [x.detach().double() for x in (first, second, *derivatives)]


@pytest.mark.parametrize("case", QUICK, ids=title)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_values_and_gradients_are_those_of_activation_moments(
    case: tuple[str, dict[str, Any]], dtype: torch.dtype, tolerance: float
) -> None:
    name, parameters = case
    mean, var = grid(dtype)
    m, v = (x.detach().double().requires_grad_() for x in (mean, var))
    found = with_gradients(mean, var, *lane_moments(name, mean, var, parameters))
    exact = activation_moments(name, m, v.sqrt(), **parameters)
    expected = with_gradients(m, v, exact.mean, exact.var)
    std = v.detach().sqrt()
    one = torch.ones_like(std)
    size = (m.detach().square() + v.detach()).sqrt() + expected[0].abs()
    # The scale of an input's spread, beside which the rounding of the mean counts, too.
    rounding = 4 * torch.finfo(torch.float64).eps * m.detach().abs() / std
    for a, b, scale in zip(found, expected, (size, std.square(), one, 1 / std, std, one), strict=True):
        assert float(((a - b).abs() / scale - rounding).max()) < tolerance


@pytest.mark.parametrize("case", QUICK, ids=title)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_squared_slopes_are_those_of_activation_moments(
    case: tuple[str, dict[str, Any]], dtype: torch.dtype, tolerance: float
) -> None:
    name, parameters = case
    mean, var = (x.detach() for x in grid(dtype))
    found = mean_square_slope(name, mean, var, parameters)
    panels = lane_panels(name, tuple(sorted(parameters.items())), SINGLE)
    assert panels is not None
    if isinstance(panels.form, Piecewise):
        assert found is None  # closed forms are cheap
        return
    assert found is not None
    assert found.dtype == dtype
    exact = activation_moments(name, mean.double(), var.double().sqrt(), **parameters).slope
    assert float(((found.double() - exact).abs() / (1 + exact)).max()) < tolerance


@pytest.mark.parametrize("case", OTHERS, ids=title)
def test_the_rest_is_activation_moments(case: tuple[str, dict[str, Any]]) -> None:
    name, parameters = case
    mean, var = torch.tensor([-1.0, 0.3]), torch.tensor([0.5, 2.0])
    expected = activation_moments(name, mean, var.sqrt(), **parameters)
    first, second = lane_moments(name, mean, var, parameters)
    assert torch.equal(first, expected.mean)
    assert torch.equal(second, expected.var)


@pytest.mark.parametrize("case", [("silu", {}), ("gelu", {}), ("elu", {"alpha": 0.5}), ("hardswish", {})], ids=title)
def test_first_and_second_derivatives(case: tuple[str, dict[str, Any]]) -> None:
    mean = torch.tensor([-1.5, 0.1, 0.4, 3.1], dtype=torch.float64, requires_grad=True)
    var = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    function = lambda m, v: lane_moments(case[0], m, v, case[1])
    assert torch.autograd.gradcheck(function, (mean, var))
    assert torch.autograd.gradgradcheck(function, (mean, var))


def test_a_gradient_by_one_of_the_two_differentiates_again() -> None:
    mean, var = torch.tensor([0.3]), torch.tensor([1.5], requires_grad=True)
    first, second = lane_moments("silu", mean, var, {})
    (slope,) = torch.autograd.grad((first + second).sum(), var, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), var)
    step = torch.tensor([0.01])
    with torch.no_grad():
        low, middle, high = (sum(lane_moments("silu", mean.double(), var + h, {})) for h in (-step, 0 * step, step))
    torch.testing.assert_close(bend.double(), ((low + high - 2 * middle) / step.square()).double(), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("std", [1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("name", ["silu", "selu", "sigmoid", "hardswish", "relu6"])
def test_hardly_any_variance(name: str, std: float) -> None:
    """At knots, too, E f − f(m) and Var f keep to their own scale: s where f has a kink, s² elsewhere."""
    mean = torch.tensor([-3.0, 0.0, 0.7, 6.0], dtype=torch.float64)
    first, second = lane_moments(name, mean, torch.full_like(mean, std**2), {})
    exact = activation_moments(name, mean, torch.full_like(mean, std))
    torch.testing.assert_close(first, exact.mean, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(second, exact.var, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", ["silu", "gelu", "elu", "hardswish", "relu6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_variance(name: str, dtype: torch.dtype) -> None:
    mean = torch.tensor([-2.0, 0.0, 2.0], dtype=dtype, requires_grad=True)
    var = torch.zeros(3, dtype=dtype, requires_grad=True)
    first, second = lane_moments(name, mean, var, {})
    value = getattr(nn.functional, name)(mean.detach())
    torch.testing.assert_close(first.detach(), value)
    assert float(second.detach().abs().max()) == 0.0
    by_mean, by_var = torch.autograd.grad(second.sum(), (mean, var), retain_graph=True)
    assert float(by_mean.abs().max()) == 0.0
    slope = torch.func.vmap(torch.func.grad(getattr(nn.functional, name)))(mean.detach())
    torch.testing.assert_close(by_var[[0, 2]], slope[[0, 2]].square(), rtol=1e-4, atol=1e-6)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(first.sum(), (mean, var)))


def test_half_precision_gives_single() -> None:
    mean, var = (x.bfloat16().requires_grad_() for x in (torch.tensor([0.5, -1.0]), torch.tensor([1.0, 2.0])))
    first, second = lane_moments("silu", mean, var, {})
    expected = activation_moments("silu", mean, var.double().sqrt())
    assert first.dtype == second.dtype == torch.float32
    torch.testing.assert_close(second, expected.var.float())
    assert {g.dtype for g in torch.autograd.grad((first + second).sum(), (mean, var))} == {torch.bfloat16}


def test_shapes_broadcast_and_may_be_empty_or_without_values() -> None:
    first, second = lane_moments("silu", torch.zeros(1, 3, 1, 1), torch.ones(1, 1, 2, 1), {})
    assert first.shape == second.shape == (1, 3, 2, 1)
    assert lane_moments("silu", torch.zeros(1, 0), torch.ones(1, 0), {})[0].shape == (1, 0)
    assert lane_moments("hardswish", torch.zeros(4, device="meta"), torch.ones(4, device="meta"), {})[1].shape == (4,)


def test_fake_tensors_leave_nothing_behind() -> None:
    with FakeTensorMode() as fake:
        mean = fake.from_tensor(torch.zeros(2))
        assert lane_moments("celu", mean, mean + 1, {"alpha": 0.7})[0].shape == (2,)
    assert float(lane_moments("celu", torch.zeros(1), torch.ones(1), {"alpha": 0.7})[1]) > 0.0


def test_many_channels_are_those_one_by_one() -> None:
    mean, var = torch.randn(1500), torch.rand(1500) + 0.1
    whole = lane_moments("gelu", mean, var, {})
    for i in (0, 700, 1499):
        for a, b in zip(whole, lane_moments("gelu", mean[i], var[i], {}), strict=True):
            torch.testing.assert_close(a[i], b)


def test_single_precision_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Metal, which has no float64."""
    monkeypatch.setattr("normprop.activations.fast_moments.working_dtype", lambda device: torch.float32)
    mean, var = torch.tensor([-2.0, 0.0, 0.7, 5.0]), torch.tensor([0.5, 1.0, 2.0, 0.01])
    found = lane_moments("silu", mean, var, {})
    monkeypatch.undo()
    assert working_dtype(mean.device) == torch.float64
    for a, b in zip(found, lane_moments("silu", mean, var, {}), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "hardswish"])
def test_vmap(name: str) -> None:
    mean, var = torch.randn(4, 3), torch.rand(3) + 0.1
    total = lambda m: sum(t.sum() for t in lane_moments(name, m, var, {}))
    together = torch.func.vmap(torch.func.grad(total))(mean)
    rows = mean.clone().requires_grad_()
    (alone,) = torch.autograd.grad(total(rows), rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_the_rules_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("all moments were computed")

    monkeypatch.setattr("normprop.activations.fast_moments.activation_moments", never)
    x = Moments(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1))
    by_module = module_activation(nn.Hardtanh(-0.5, 2.0), x)
    by_name = named_activation("hardtanh", ("min_val", "max_val"), x, -0.5, max_val=2.0, inplace=True)
    assert torch.equal(by_module.var, by_name.var)
    assert lane_panels("hardtanh", (("max_val", 2.0), ("min_val", -0.5)), SINGLE) is not None


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, activation in enumerate((nn.SiLU(), nn.GELU(), nn.Hardswish())):
        layers += [nn.Conv2d(3 if i == 0 else 6, 6, 3), nn.BatchNorm2d(6), activation, nn.Conv2d(6, 6, 1)]
    return normprop.convert(nn.Sequential(*layers, nn.BatchNorm2d(6)))


def test_a_network_compiles(small: nn.Module) -> None:
    x = torch.randn(2, 3, 9, 9)
    compiled = torch.compile(copy.deepcopy(small), fullgraph=True, backend="eager")
    for model in (small, compiled):
        model(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), small(x), rtol=1e-4, atol=1e-5)
    for a, b in zip(small.parameters(), compiled.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_a_network_exports(small: nn.Module) -> None:
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x), rtol=1e-4, atol=1e-5)


class WrittenOut(nn.Module):
    """Two branches of equal width, each with hardswish, the exact GELU or a SiLU that nobody knows, written out."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.last = nn.Conv2d(6, 6, 1)

    def activation(self, u: Tensor) -> Tensor:
        if self.which == "hardswish":
            return u * nn.functional.relu6(u + 3) / 6
        return u * torch.sigmoid(1.702 * u) if self.which == "quick" else 0.5 * u * (1 + torch.erf(u * 2**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        both = self.activation(self.norms[0](self.first(x))) + self.activation(self.norms[1](self.second(x)))
        result: Tensor = self.norms[2](self.last(both))
        return result


@pytest.mark.parametrize("which", ["hardswish", "gelu", "quick"])
def test_activations_written_out(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that do not wait for each other are one call, and known ones take the function of the known one."""
    torch.manual_seed(0)
    model = normprop.convert(WrittenOut(which).double())
    lane = normprop.lane(model)
    assert lane.program(lane.entries[True]).code.count(composed_activations.__name__) == 1
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr("normprop.rules.composed._known", lambda program: None)
    model(x).square().sum().backward()
    for a, b in zip(found, (p.grad for p in model.parameters()), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_what_is_written_out_is_found() -> None:
    silu = (("sigmoid", ("%0",), ()), ("mul", ("%0", "%1"), ()))
    quick = (("mul", ("%0", 1.702), ()), ("sigmoid", ("%1",), ()), ("mul", ("%0", "%2"), ()))
    assert _known(silu) == ("silu", ())
    assert _known(quick) is None


@pytest.mark.parametrize("name", ["silu", "relu6"])
def test_what_is_kept_is_fit_for_any_later_call(name: str) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    lane_panels.cache_clear()
    with torch.device("meta"):
        lane_moments(name, torch.zeros(3), torch.ones(3), {})
    lane_moments(name, mean, var, {})
    lane_panels.cache_clear()
    with torch.inference_mode():
        lane_moments(name, mean, var, {})
    first, second = lane_moments(name, mean.requires_grad_(), var.requires_grad_(), {})
    (first + second).sum().backward()
    assert mean.grad is not None
