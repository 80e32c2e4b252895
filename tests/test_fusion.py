"""Activations that are written out: as good as their module, right by sampling, and what is left alone."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normprop
from normprop import Moments, NormPropError, UnsupportedOpError
from normprop.graph.preparation import prepare
from normprop.rules.composed import composed, find_bends

Function = Callable[[Tensor], Tensor]


class Written(nn.Module):
    """A function of a tensor as a module that tracing enters."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Relu6Gate(nn.Module):
    """The hard swish of MobileNet's first implementations: modules inside an expression."""

    def __init__(self) -> None:
        super().__init__()
        self.relu6 = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.relu6(x + 3) * (1 / 6)


class LearnedSwish(nn.Module):
    """x σ(βx) with a β per channel."""

    def __init__(self, *beta: float) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class StarRelu(nn.Module):
    """s relu(x)² + b with learned s and b."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.scale, self.bias = (nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (0.9, -0.45))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.relu(x) ** 2 + self.bias


class Acon(nn.Module):
    """(p₁ − p₂) x σ(β (p₁ − p₂) x) + p₂ x, everything learned per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.p1, self.p2, self.beta = (nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        difference = (self.p1 - self.p2) * x
        return difference * torch.sigmoid(self.beta * difference) + self.p2 * x


class SlopesAndMore(nn.Module):
    """PReLU, a slope a channel, within a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU(4, dtype=torch.float64)
        with torch.no_grad():
            self.act.weight.copy_(torch.tensor([0.1, 0.4, -0.3, 1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + self.act(x) + F.prelu(x, self.act.weight)


# Written out, and torch's own name for it.
EQUAL: dict[str, tuple[Function, nn.Module]] = {
    "silu": (lambda x: x * torch.sigmoid(x), nn.SiLU()),
    "silu by methods": (lambda x: x.mul(x.sigmoid()), nn.SiLU()),
    "silu by exp": (lambda x: x / (1 + torch.exp(-x)), nn.SiLU()),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), nn.Mish()),
    "mish by logarithm": (lambda x: x * (1 + x.exp()).log().tanh(), nn.Mish()),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, nn.Hardswish()),
    "hardswish by clamp": (lambda x: x * (x + 3).clamp(0, 6) / 6, nn.Hardswish()),
    "hardswish in place": (lambda x: x.mul(F.relu6(x + 3.0).div_(6.0)), nn.Hardswish()),
    "hardswish by modules": (Relu6Gate(), nn.Hardswish()),
    "hardsigmoid": (lambda x: F.relu6(x + 3) / 6, nn.Hardsigmoid()),
    "gelu": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), nn.GELU()),
    "gelu by Φ": (lambda x: x * torch.special.ndtr(x), nn.GELU()),
    "gelu by tanh": (
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        nn.GELU(approximate="tanh"),
    ),
    "elu": (lambda x: torch.where(x > 0, x, torch.exp(x) - 1), nn.ELU()),
    "elu by expm1": (lambda x: torch.where(x < 0, 0.5 * torch.expm1(x), x), nn.ELU(0.5)),
    "elu by parts": (lambda x: F.relu(x) - F.relu(1 - torch.exp(x)), nn.ELU()),
    "softplus": (lambda x: torch.log1p(torch.exp(x)), nn.Softplus()),
    "softplus by logaddexp": (lambda x: torch.logaddexp(x, torch.zeros_like(x)), nn.Softplus()),
    "softsign": (lambda x: x / (1 + x.abs()), nn.Softsign()),
    "tanh": (lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()), nn.Tanh()),
    "tanhshrink": (lambda x: x - torch.tanh(x), nn.Tanhshrink()),
    "relu by mask": (lambda x: x * (x > 0), nn.ReLU()),
    "relu by mask of floats": (lambda x: (x >= 0).float() * x, nn.ReLU()),
    "relu by masked_fill": (lambda x: x.masked_fill(~(x > 0), 0.0), nn.ReLU()),
    "relu by abs": (lambda x: 0.5 * (x + x.abs()), nn.ReLU()),
    "leaky_relu": (lambda x: torch.max(x, 0.1 * x), nn.LeakyReLU(0.1)),
    "leaky_relu by maximum": (lambda x: torch.maximum(0.1 * x, x), nn.LeakyReLU(0.1)),
    "hardtanh": (lambda x: torch.minimum(torch.ones_like(x), torch.maximum(x, torch.full_like(x, -1.0))), nn.Hardtanh()),
    "hardshrink": (lambda x: torch.where((x > 0.5) | (x < -0.5), x, 0.0), nn.Hardshrink()),
    "softshrink": (lambda x: F.relu(x - 0.5) - F.relu(-x - 0.5), nn.Softshrink()),
    "relu twice": (lambda x: F.relu(F.relu(x)), nn.ReLU()),
    "identity": (lambda x: F.relu(x) - F.relu(-x), nn.Identity()),
}

# Written out, and torch knows it under no name.
FURTHER: dict[str, Function] = {
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "squared relu": lambda x: F.relu(x) ** 2,
    "squared relu by itself": lambda x: F.relu(x) * F.relu(x),
    "scaled clamp": lambda x: x.clamp(min=0) * 2,
    "bent identity": lambda x: ((x**2 + 1).sqrt() - 1) / 2 + x,
    "inverse root unit": lambda x: x * torch.rsqrt(1 + x * x),
    "telu": lambda x: x * torch.tanh(torch.exp(x)),
    "serf": lambda x: x * torch.erf(F.softplus(x)),
    "logish": lambda x: x * torch.log1p(torch.sigmoid(x)),
    "snake": lambda x: x + torch.sin(2 * x).square() / 2,
    "bell": lambda x: torch.exp(-x * x),
    "smooth step": lambda x: x.clamp(0, 1) ** 2 * (3 - 2 * x.clamp(0, 1)),
    "arctan": lambda x: torch.atan(2 * x),
    "arsinh": lambda x: x.asinh(),
    "power of two": lambda x: 2**x,
    "exp2": lambda x: torch.exp2(x / 2),
    "sinc": lambda x: torch.sinc(x),
    "fourth power": lambda x: x**4,
    "logical": lambda x: torch.where(torch.logical_and(x > -1, torch.logical_not(x >= 1)), x, -x),
    "either": lambda x: x * torch.logical_or(x.gt(0.3), x.le(-0.7)),
    "lerp": lambda x: torch.lerp(x, torch.tanh(x), 0.3),
    "lerp by itself": lambda x: torch.lerp(x, 2 * x, torch.sigmoid(x)),
    "addcmul": lambda x: torch.addcmul(x, x, torch.sigmoid(x), value=0.5),
    "reciprocal": lambda x: torch.reciprocal(1 + x.square()),
    "swish per channel": LearnedSwish(0.5, 1.0, 2.0, 5.0),
    "star relu": StarRelu(),
    "acon": Acon(),
    "slopes": SlopesAndMore(),
    "logarithm on one side": lambda x: torch.where(x > 0, x.log1p(), x),
}


def layers(activation: nn.Module, *, shape: tuple[int, ...] = ()) -> nn.Module:
    """Two layers with the activation between them, γ and β at random."""
    torch.manual_seed(3)
    layer = nn.Conv2d if shape else nn.Linear
    size = (1,) if shape else ()
    norm = nn.BatchNorm2d if shape else nn.BatchNorm1d
    model = nn.Sequential(layer(4, 4, *size), norm(4), activation, layer(4, 4, *size), norm(4)).double()
    with torch.no_grad():
        model[1].weight.uniform_(0.3, 1.7)
        model[1].bias.normal_()
    return model


def behind(model: nn.Module) -> Moments:
    """What is predicted of the activation's output."""
    rows = [row for row in normprop.propagate(model) if row.path.startswith("2") and row.predicted is not None]
    assert rows[-1].standing == "exact" or "bend" in rows[-1].reason, rows[-1].reason
    return rows[-1].predicted


@pytest.mark.parametrize("name", EQUAL)
def test_a_written_activation_is_its_module(name: str) -> None:
    function, module = EQUAL[name]
    written, named = layers(Written(function)), layers(module)
    found, expected = behind(written), behind(named)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.var, expected.var, rtol=1e-9, atol=1e-11)
    x = torch.randn(5, 4, dtype=torch.float64)
    pair = [normprop.convert(m, preserve=False) for m in (written, named)]
    torch.testing.assert_close(pair[0](x), pair[1](x), rtol=1e-9, atol=1e-9)
    for model in pair:
        model(x).square().sum().backward()
    close = 1e-5 if name == "hardsigmoid" else 1e-7  # torch's own derivative of it is 1/6 in single precision
    for (key, a), b in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=close, atol=0.1 * close, msg=key)


@pytest.mark.parametrize("name", FURTHER)
def test_a_written_activation_by_sampling(name: str) -> None:
    function = FURTHER[name]
    model = layers(function if isinstance(function, nn.Module) else Written(function))
    found = behind(model)
    gamma, beta = model[1].weight.detach(), model[1].bias.detach()
    u = beta + gamma * torch.randn(400_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = function(u).detach().double()
    error = y.std(0) / len(y) ** 0.5
    assert bool(((y.mean(0) - found.mean).abs() < 5 * error + 1e-12).all())
    squares = (y - found.mean).square()
    assert bool(((squares.mean(0) - found.var).abs() < 5 * squares.std(0) / len(y) ** 0.5 + 1e-12).all())


@pytest.mark.parametrize("name", ["mish", "hardswish by modules", "elu", "relu by mask of floats"])
def test_images_and_their_data_lane(name: str) -> None:
    written, named = layers(Written(EQUAL[name][0]), shape=(1,)), layers(EQUAL[name][1], shape=(1,))
    torch.testing.assert_close(behind(written).var, behind(named).var, rtol=1e-9, atol=0.0)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(normprop.convert(written)(x), normprop.convert(named)(x))
    trained = layers(Written(EQUAL[name][0]), shape=(1,))
    trained[1].running_mean.normal_()
    torch.testing.assert_close(normprop.fold(normprop.convert(trained))(x), trained.eval()(x))


def test_slopes_per_channel_of_an_image() -> None:
    model = layers(SlopesAndMore(), shape=(1,))
    u = model[1].bias + model[1].weight * torch.randn(200_000, 4, dtype=torch.float64)
    y = model[2](u).detach()
    torch.testing.assert_close(behind(model).var.flatten(), y.var(0), rtol=0.03, atol=0.0)
    assert normprop.convert(model)(torch.randn(2, 4, 3, 3, dtype=torch.float64)).shape == (2, 4, 3, 3)


CONVERTED: dict[str, nn.Module] = {
    "mish": Written(EQUAL["mish"][0]),
    "elu": Written(EQUAL["elu"][0]),
    "swish per channel": FURTHER["swish per channel"],  # type: ignore[dict-item]
    "slopes": FURTHER["slopes"],  # type: ignore[dict-item]
}
each = pytest.mark.parametrize("name", CONVERTED)


@each
def test_copies_compute_the_same(name: str) -> None:
    model = normprop.convert(layers(CONVERTED[name]))
    x = torch.randn(3, 4, dtype=torch.float64)
    stored: Any = pickle.loads(pickle.dumps(model)) if name in ("swish per channel", "slopes") else copy.deepcopy(model)
    for other in (copy.deepcopy(model), stored):
        assert torch.equal(other(x), model(x))
    rows = [normprop.propagate(m)[-1].predicted for m in (model, stored)]
    assert torch.equal(rows[0].var, rows[1].var)


# torch.compile imports modules of torch that call what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@each
def test_transforms(name: str) -> None:
    model = normprop.convert(layers(CONVERTED[name]))
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    trainable = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    loss = lambda p, one: torch.func.functional_call(model, p, (one[None],)).square().sum()
    each_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trainable, x)
    model(x).square().sum().backward()
    for key, gradient in each_sample.items():
        torch.testing.assert_close(gradient.sum(0), model.get_parameter(key).grad, msg=key)


@each
def test_derivatives(name: str) -> None:
    model = normprop.convert(layers(CONVERTED[name]))
    names = [k for k, p in model.named_parameters() if p.requires_grad and k.startswith(("1.", "2."))]
    given = tuple(model.get_parameter(k).detach().clone().requires_grad_() for k in names)
    x = torch.randn(2, 4, dtype=torch.float64)
    call = lambda *values: torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_a_learned_parameter_moves_the_moments() -> None:
    model = normprop.convert(layers(LearnedSwish(0.5, 1.0, 2.0, 5.0)))
    with torch.no_grad():
        model.get_parameter("2.beta").mul_(3)
    (row,) = [r for r in normprop.propagate(model) if r.operation.endswith("mul") and r.slope is not None]
    gamma, beta = model.get_parameter("1.weight").detach(), model.get_parameter("1.bias").detach()
    factors = (1.5, 3.0, 6.0, 15.0)
    for c, b in enumerate(factors):  # x σ(bx) = silu(bx)/b
        silu = normprop.moments("silu", b * beta[c], b * gamma[c])
        torch.testing.assert_close(row.predicted.mean[0, c], silu.mean / b, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(row.predicted.var[0, c], silu.var / b**2, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_an_activation_named_by_its_user() -> None:
    class Wave(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x) + torch.where(x > 0.3, x, 0.3)

    rules = {Wave: normprop.rules.activation}
    model = layers(Wave())
    converted = normprop.convert(model, rules=rules)
    (row,) = [r for r in normprop.propagate(model, rules=rules) if r.path == "2"]
    u = normprop.moments(Wave(), model[1].bias.detach(), model[1].weight.detach())
    torch.testing.assert_close(row.predicted.mean[0], u.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(row.predicted.var[0], u.var, rtol=1e-10, atol=1e-12)
    assert row.slope is not None
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(converted, fullgraph=True, backend="aot_eager")(x), converted(x))
    trainable = {k: p.detach() for k, p in converted.named_parameters() if p.requires_grad}
    loss = lambda p, one: torch.func.functional_call(converted, p, (one[None],)).square().sum()
    assert torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trainable, x)["1.bias"].shape == (3, 4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_function_of_torch_named_by_its_user() -> None:
    rules = {torch.special.i0e: normprop.rules.activation, "erfc_": normprop.rules.activation}
    model = layers(Written(lambda x: 2 * torch.special.i0e(x)))
    with pytest.raises(UnsupportedOpError, match="i0e"):
        normprop.convert(model)
    row = normprop.propagate(model, rules=rules)[-3]
    u = normprop.moments("torch.special.i0e", model[1].bias.detach(), model[1].weight.detach())
    torch.testing.assert_close(row.predicted.var[0], 4 * u.var, rtol=1e-10, atol=1e-12)
    converted, x = normprop.convert(model, rules=rules), torch.randn(3, 4, dtype=torch.float64)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(converted, fullgraph=True, backend="aot_eager")(x), converted(x))
    by_method = normprop.propagate(layers(Written(lambda x: x.clone().erfc_())), rules=rules)
    torch.testing.assert_close(by_method[-3].predicted.var, behind(layers(Written(torch.erfc))).var, rtol=1e-9, atol=0.0)
    with pytest.raises(NormPropError, match="only modules and functions of torch can"):
        normprop.convert(layers(Written(lambda x: math_of(x))), rules={math_of: normprop.rules.activation})


def math_of(x: Tensor) -> Tensor:
    """A function of the user's that tracing does not enter, as it has a rule."""
    return torch.sin(x)


def test_what_is_no_activation_is_refused_with_its_place() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean()

    with pytest.raises(NormPropError, match=r"2 cannot be integrated as an activation.*not elementwise"):
        normprop.convert(layers(Mixing()), rules={Mixing: normprop.rules.activation})


class Sliced(nn.Module):
    """A parameter cut to the size of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.rand(9, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta[: x.shape[1]].exp() * x)


def test_a_computed_parameter() -> None:
    model = layers(Sliced())
    beta = model[2].beta[:4].detach().exp()
    u = normprop.moments("silu", beta * model[1].bias.detach(), beta * model[1].weight.detach())  # x σ(bx) = silu(bx)/b
    torch.testing.assert_close(behind(model).mean[0], u.mean / beta, rtol=1e-7, atol=1e-9)
    converted = normprop.convert(model)
    converted(torch.randn(3, 4, dtype=torch.float64)).square().sum().backward()
    assert bool((converted.get_parameter("2.beta").grad[:4] != 0).all())


@pytest.mark.parametrize("name", ["Swish", "Mish", "HardSwish", "HardMish", "QuickGELU", "GELUTanh", "PReLU"])
def test_activations_of_timm(name: str) -> None:
    activations = pytest.importorskip("timm.layers.activations")
    module = getattr(activations, name)().double()
    model = layers(module)
    found = behind(model)
    u = model[1].bias + model[1].weight * torch.randn(100_000, 4, dtype=torch.float64)
    y = module(u.detach()).detach()
    assert bool(((y.mean(0) - found.mean).abs() < 5 * y.std(0) / len(y) ** 0.5).all())
    torch.testing.assert_close(y.var(0), found.var[0], rtol=0.03, atol=0.0)


def programs(function: Function) -> list[Any]:
    return [f.program for f in prepare(layers(Written(function))).fused.values()]


def test_what_a_rule_of_its_own_serves_is_left_to_it() -> None:
    for function in (
        lambda x: F.relu(2 * x + 1) / 3,
        lambda x: (lambda y: y * y)(x - 1),
        lambda x: 5 - x.tanh(),
        lambda x: x.detach().clone() * 2 + x.new_ones(1).sum(),
        torch.sigmoid,
    ):
        assert programs(function) == []


def test_a_bound_per_channel_is_left_to_its_closed_form() -> None:
    bound = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    for function in (lambda x: torch.max(x, bound), lambda x: torch.minimum(x, bound)):
        model = layers(Written(function))
        assert programs(function) == []
        u = model[1].bias + model[1].weight * torch.randn(200_000, 4, dtype=torch.float64)
        torch.testing.assert_close(behind(model).var[0], function(u.detach()).var(0), rtol=0.03, atol=2e-4)


def test_a_program_starts_at_the_last_affine_step_that_all_goes_through() -> None:
    (program,) = programs(lambda x: (lambda y: y * torch.sigmoid(y))(3 * x + 1))
    assert program == (("sigmoid", ("%0",), ()), ("mul", ("%0", "%1"), ()))
    model = prepare(layers(FURTHER["acon"]))  # type: ignore[arg-type]
    assert {n.name for n in (f.source for f in model.fused.values())} <= {"2_mul", "1"}


def test_a_root_of_what_may_be_negative_stays_an_expansion() -> None:
    assert programs(lambda x: x / torch.sqrt(x.square().mean(1, keepdim=True) + 1e-5)) == []
    assert find_bends((("log", ("%0",), ()),)) is None
    assert find_bends((("square", ("%0",), ()), ("exp", ("%1",), ()))) is None
    with pytest.raises(UnsupportedOpError, match=r"torch\.where"):  # its gradient is NaN in every network
        normprop.propagate(layers(Written(lambda x: torch.where(x > 0, x.sqrt(), 0.0))))


def test_two_tensors_are_two_tensors() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * torch.sigmoid(self.b(x))

    assert prepare(Gate()).fused == {}
    with pytest.raises(UnsupportedOpError, match=r"torch\.where"):
        normprop.propagate(Written(lambda x: torch.where(x > 0, x, x.mean(1, keepdim=True))))


def test_random_activations_are_no_function() -> None:
    model = layers(Written(lambda x: x * F.rrelu(x, training=True)))
    assert prepare(model).fused == {}


@pytest.mark.parametrize("std", [0.0, 1e-6, 1e-3, 1.0, 30.0, 1e3])
def test_narrow_and_wide_gaussians(std: float) -> None:
    program = (("sigmoid", ("%0",), ()), ("mul", ("%0", "%1"), ()))
    mean = torch.tensor([-2.0, 0.0, 0.7], dtype=torch.float64)
    var = torch.full_like(mean, std**2).requires_grad_()
    found, expected = composed(Moments(mean, var), program, *find_bends(program)), normprop.moments("silu", mean, std)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.var, expected.var, rtol=max(1e-9, 1e-14 / max(std, 1e-9) ** 2), atol=1e-16)
    (gradient,) = torch.autograd.grad(found.mean.sum() + found.var.sum(), var)
    assert bool(gradient.isfinite().all())


def test_half_precision_networks_get_single_precision_moments() -> None:
    model = normprop.convert(layers(Written(EQUAL["mish"][0])).bfloat16())
    assert model(torch.randn(3, 4).bfloat16()).dtype == torch.bfloat16
