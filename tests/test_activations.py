import functools
import inspect
import itertools
import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop.activations.activation_moments import activation_moments, moments
from normprop.activations.catalogue import ACTIVATIONS, ROWS, canonical, written_values
from normprop.errors import NormPropError

MEANS = [0.0, *(s * m for m in (1e-3, 0.03, 0.7, 2.9, 6.5, 30.0, 200.0, 1e3) for s in (1, -1))]
STDS = [1e-3, 0.02, 0.3, 1.0, 4.0, 37.0, 1e3]
FIELDS = ("mean", "var", "second", "slope")
half, sixth = mpmath.mpf(1) / 2, mpmath.mpf(1) / 6

# Pieces as coefficients of 1, u, u²; written from torch's documentation, not from the code.
PIECEWISE = {
    "identity": ({}, [[0, 1]], []),
    "neg": ({}, [[0, -1]], []),
    "square": ({}, [[0, 0, 1]], []),
    "relu": ({}, [[0], [0, 1]], [0]),
    "abs": ({}, [[0, -1], [0, 1]], [0]),
    "leaky_relu": ({}, [[0, 0.01], [0, 1]], [0]),
    "prelu": ({"weight": -0.3}, [[0, -0.3], [0, 1]], [0]),
    "rrelu": ({}, [[0, mpmath.mpf(11) / 48], [0, 1]], [0]),
    "relu6": ({}, [[0], [0, 1], [6]], [0, 6]),
    "hardtanh": ({"min_val": -0.5, "max_val": 2.0}, [[-0.5], [0, 1], [2]], [-0.5, 2]),
    "clamp": ({"max": 0.25}, [[0, 1], [0.25]], [0.25]),
    "clamp_min": ({"min": -1.0}, [[-1], [0, 1]], [-1]),
    "clamp_max": ({"max": 3.0}, [[0, 1], [3]], [3]),
    "threshold": ({"threshold": 1.5, "value": -2.0}, [[-2], [0, 1]], [1.5]),
    "hardsigmoid": ({}, [[0], [half, sixth], [1]], [-3, 3]),
    "hardswish": ({}, [[0], [0, half, sixth], [0, 1]], [-3, 3]),
    "hardshrink": ({}, [[0, 1], [0], [0, 1]], [-0.5, 0.5]),
    "softshrink": ({"lambd": 0.75}, [[0.75, 1], [0], [-0.75, 1]], [-0.75, 0.75]),
    "sign": ({}, [[-1], [1]], [0]),
    "heaviside": ({}, [[0], [1]], [0]),
    "gt": ({"other": 0.3}, [[0], [1]], [0.3]),
    "ge": ({"other": -1.0}, [[0], [1]], [-1]),
    "lt": ({"other": 0.3}, [[1], [0]], [0.3]),
    "le": ({"other": 2.0}, [[1], [0]], [2]),
}
JUMPING = ("threshold", "hardshrink", "sign", "heaviside", "gt", "ge", "lt", "le")
STEPS = ("floor", "ceil", "round", "trunc")


def product(p, q):
    out = [mpmath.mpf(0)] * (len(p) + len(q) - 1)
    for (i, a), (j, b) in itertools.product(enumerate(p), enumerate(q)):
        out[i + j] += a * b
    return out


def in_z(coefficients, mean, std):
    """A polynomial in u as one in z = (u − mean)/std, by Horner's rule."""
    out = [mpmath.mpf(0)]
    for c in reversed(coefficients):
        out = product(out, [mean, std])
        out[0] += c
    return out


def dot(coefficients, powers):
    return sum((c * power for c, power in zip(coefficients, powers, strict=False)), mpmath.mpf(0))


def truncated(low, high, order):
    """∫_low^high z^n φ, by the textbook recurrence; at 420 digits its cancellation does not matter."""
    edge = lambda z, n: mpmath.mpf(0) if mpmath.isinf(z) else z**n * mpmath.npdf(z)
    out = [mpmath.ncdf(high) - mpmath.ncdf(low), edge(low, 0) - edge(high, 0)]
    for n in range(2, order + 1):
        out.append(edge(low, n - 1) - edge(high, n - 1) + (n - 1) * out[n - 2])
    return out


def piecewise_oracle(pieces, knots, mean, std):
    mean, std = mpmath.mpf(mean), mpmath.mpf(std)
    ends = [-mpmath.inf, *((mpmath.mpf(k) - mean) / std for k in knots), mpmath.inf]
    first = second = slope = mpmath.mpf(0)
    for piece, low, high in zip(pieces, ends, ends[1:], strict=False):
        q = in_z([mpmath.mpf(c) for c in piece], mean, std)
        dq = in_z([i * mpmath.mpf(c) for i, c in enumerate(piece)][1:], mean, std)
        z = truncated(low, high, 2 * len(q))
        first, second, slope = first + dot(q, z), second + dot(product(q, q), z), slope + dot(product(dq, dq), z)
    return first, second - first**2, second, slope


@pytest.mark.parametrize("name", PIECEWISE)
def test_piecewise_polynomials_to_twelve_digits_tails_included(name):
    parameters, pieces, knots = PIECEWISE[name]
    grid = list(itertools.product(MEANS, STDS))
    mean, std = torch.tensor(grid, dtype=torch.float64).unbind(1)
    result = activation_moments(name, mean, std, **parameters)
    with mpmath.workdps(420):
        for i, point in enumerate(grid):
            expected = piecewise_oracle(pieces, knots, *point)
            for field, true in zip(FIELDS, expected, strict=True):
                value = getattr(result, field)[i].item()
                assert value == float("inf") or abs(value - true) <= result.error[i].item() + 1e-299, (point, field)
                if field == "slope" and name in JUMPING:
                    assert value == float("inf")
                elif field == "mean":
                    # A mean may cancel, as that of hardtanh near 0 does; its natural size is √E f².
                    size = mpmath.sqrt(abs(expected[2]))
                    assert abs(value - true) <= 1e-12 * abs(true) + 1e-14 * size, (point, field)
                elif abs(true) > 1e-300:
                    assert abs(value - true) <= 1e-12 * abs(true), (point, field)
                else:
                    assert abs(value) < 1e-299, (point, field)


def sigma(u):
    return 1 / (1 + mpmath.exp(-u)) if u > 0 else mpmath.exp(u) / (1 + mpmath.exp(u))


def softplus(u):
    return mpmath.log1p(mpmath.exp(u)) if u < 60 else u + mpmath.log1p(mpmath.exp(-u))


SCALE, ALPHA = mpmath.mpf("1.0507009873554804934193349852946"), mpmath.mpf("1.6732632423543772848170429916717")
SMOOTH = {
    "sigmoid": ({}, sigma),
    "tanh": ({}, mpmath.tanh),
    "silu": ({}, lambda u: u * sigma(u)),
    "mish": ({}, lambda u: u * mpmath.tanh(softplus(u))),
    "softplus": ({"beta": 2.0}, lambda u: softplus(2 * u) / 2),
    "logsigmoid": ({}, lambda u: -softplus(-u)),
    "elu": ({"alpha": 0.5}, lambda u: u if u > 0 else mpmath.expm1(u) / 2),
    "celu": ({"alpha": 2.0}, lambda u: u if u > 0 else 2 * mpmath.expm1(u / 2)),
    "selu": ({}, lambda u: SCALE * (u if u > 0 else ALPHA * mpmath.expm1(u))),
    "gelu": ({}, lambda u: u * mpmath.erfc(-u / mpmath.sqrt(2)) / 2),
    "gelu tanh": (
        {"approximate": "tanh"},
        lambda u: u * sigma(2 * mpmath.sqrt(2 / mpmath.pi) * (u + mpmath.mpf("0.044715") * u**3)),
    ),
    "erf": ({}, mpmath.erf),
    "erfc": ({}, mpmath.erfc),
    "softsign": ({}, lambda u: u / (1 + abs(u))),
    "tanhshrink": ({}, lambda u: u - mpmath.tanh(u)),
    "exp": ({}, mpmath.exp),
    "sin": ({}, mpmath.sin),
    "cos": ({}, mpmath.cos),
    "sinh": ({}, mpmath.sinh),
    "cosh": ({}, mpmath.cosh),
    "pow": ({"exponent": 3}, lambda u: u**3),
}
POINTS = [(0.0, 1e-3), (0.7, 1.0), (-6.0, 1.0), (3.0, 4.0), (-30.0, 4.0), (50.0, 1e-3), (-2e-3, 30.0)]


def smooth_oracle(f, mean, std):
    """16-point Gauss-Legendre on many more panels than the library takes, in 40 digits."""
    mean, std = mpmath.mpf(mean), mpmath.mpf(std)
    marks = {sign * mpmath.mpf(k) for sign in (1, -1) for k in (0, 0.5, 1, 2, *range(4, 70, 4))}
    ends = {mpmath.mpf(k) * 3 / 2 for k in range(-16, 17)} | {(m - mean) / std for m in marks}
    ends = sorted(z for z in ends if abs(z) <= 24)
    nodes = []
    for low, high in itertools.pairwise(ends):
        for x, w in legendre_rule():
            z = low + (high - low) * x
            nodes.append((f(mean + std * z), (high - low) * w * mpmath.npdf(z)))
    first = sum(w * v for v, w in nodes)
    return first, sum(w * (v - first) ** 2 for v, w in nodes), sum(w * v * v for v, w in nodes)


@functools.cache
def legendre_rule(count=16):
    """Nodes and weights on [0, 1], by Newton's method from Tricomi's guess."""
    rule = []
    for i in range(count):
        x = mpmath.cos(mpmath.pi * (i + mpmath.mpf(3) / 4) / (count + mpmath.mpf(1) / 2))
        for _ in range(7):
            value = mpmath.legendre(count, x)
            slope = count * (x * value - mpmath.legendre(count - 1, x)) / (x * x - 1)
            x -= value / slope
        rule.append(((1 + x) / 2, 1 / ((1 - x * x) * slope**2)))
    return rule


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_against_high_precision_quadrature(name):
    parameters, f = SMOOTH[name]
    points = [p for p in POINTS if p[1] < 4 or name not in ("exp", "sinh", "cosh", "sin", "cos")]
    mean, std = torch.tensor(points, dtype=torch.float64).unbind(1)
    double = activation_moments(name.split()[0], mean, std, **parameters)
    single = activation_moments(name.split()[0], mean.float(), std.float(), **parameters)
    with mpmath.workdps(40):
        for i, point in enumerate(points):
            expected = smooth_oracle(f, *point)
            rounded = smooth_oracle(f, float(mean.float()[i]), float(std.float()[i]))
            size = mpmath.sqrt(expected[2])
            for field, true, true32 in zip(FIELDS, expected, rounded, strict=False):
                floor = size if field == "mean" else mpmath.mpf(0)
                # Below 1e-37 both the oracle and float32 run out of digits.
                floor = max(floor, mpmath.mpf(10) ** -37)
                assert abs(getattr(double, field)[i].item() - true) <= double.error[i].item() + 1e-299, (point, field)
                if abs(true32) < 3e38:
                    off = abs(getattr(single, field)[i].item() - true32)
                    assert off <= single.error[i].item() + 1e-37, (point, field, "single")
                assert abs(getattr(double, field)[i].item() - true) <= 1e-12 * max(abs(true), floor), (point, field)
                if abs(true32) < 3e38:
                    assert abs(getattr(single, field)[i].item() - true32) <= 1e-5 * max(abs(true32), floor), (
                        point,
                        field,
                    )


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n not in (*JUMPING, *STEPS, "pow")])
def test_slope_and_mean_slope_are_those_of_autograd(name):
    """Stein: dE f/dm = E f'; heat equation: dE f/ds = s d²E f/dm²; Poincaré: Var f ≤ s² E f'²; Jensen."""
    parameters = {"clamp": {"min": -1.0, "max": 1.0}, "clamp_min": {"min": -1.0}, "clamp_max": {"max": 1.0}}
    parameters = parameters.get(name, {})
    # Many knots are among the means: a derivative must not depend on the side that a mean on a knot is counted to.
    mean = torch.tensor([-3.0, -1.7, -1.0, -0.5, 0.0, 0.5, 1.0, 2.3, 6.0], dtype=torch.float64, requires_grad=True)
    std = torch.linspace(0.4, 1.7, 9, dtype=torch.float64, requires_grad=True)
    result = activation_moments(name, mean, std, **parameters)
    by_mean, by_std = torch.autograd.grad(result.mean.sum(), (mean, std), create_graph=True)
    torch.testing.assert_close(by_mean, result.mean_slope, rtol=1e-9, atol=1e-11)
    (curvature,) = torch.autograd.grad(by_mean.sum(), mean)
    torch.testing.assert_close(by_std, std * curvature, rtol=1e-7, atol=1e-10)
    assert (result.var <= std**2 * result.slope * (1 + 1e-12)).all()
    assert (result.mean_slope**2 <= result.slope * (1 + 1e-12)).all()


# Sums of the levels' probabilities, from the definition.
LEVELS = {
    "floor": mpmath.floor,
    "ceil": mpmath.ceil,
    "round": lambda u: mpmath.floor(u + half),
    "trunc": lambda u: mpmath.floor(u) if u >= 0 else mpmath.ceil(u),
}


def level_oracle(f, mean, std):
    mean, std = mpmath.mpf(mean), mpmath.mpf(std)
    low, high = (int(mpmath.floor(2 * (mean + sign * 14 * std))) for sign in (-1, 1))
    ends = [mpmath.mpf(k) / 2 for k in range(low - 2, high + 4)]
    parts = [
        (f((a + b) / 2), mpmath.ncdf((b - mean) / std) - mpmath.ncdf((a - mean) / std)) for a, b in itertools.pairwise(ends)
    ]
    first = sum(p * v for v, p in parts)
    return first, sum(p * (v - first) ** 2 for v, p in parts)


@pytest.mark.parametrize("name", STEPS)
def test_step_functions_by_the_probabilities_of_their_levels(name):
    grid = list(itertools.product((0.0, 0.3, -0.5, 1.0, -2.7, 17.2, -40.9), (1e-3, 0.05, 0.49, 0.51, 1.0, 3.9, 4.1, 20.0)))
    mean, std = torch.tensor(grid, dtype=torch.float64).unbind(1)
    found = activation_moments(name, mean, std)
    with mpmath.workdps(40):
        for i, point in enumerate(grid):
            first, var = level_oracle(LEVELS[name], *point)
            assert abs(found.mean[i].item() - first) <= 1e-13 * (1 + abs(first)), point
            assert abs(found.var[i].item() - var) <= 1e-13 * (1 + var), point
    assert found.slope.isinf().all()
    m, s = mean.clone().requires_grad_(), std.clamp(min=0.05)
    again = activation_moments(name, m, s)
    (by_mean,) = torch.autograd.grad(again.mean.sum(), m)
    torch.testing.assert_close(by_mean, again.mean_slope, rtol=1e-8, atol=1e-11)


def test_rounding_to_decimals():
    fine, coarse = activation_moments("round", 0.123, 0.2, decimals=1), activation_moments("round", 1.23, 2.0)
    assert fine.mean.item() == pytest.approx(coarse.mean.item() / 10, rel=1e-12)
    assert fine.var.item() == pytest.approx(coarse.var.item() / 100, rel=1e-12)


# What a row's functions are called with, where they ask for it or their defaults are too plain.
ARGUMENTS = {
    "leaky_relu": {"negative_slope": 0.2},
    "prelu": {"weight": torch.tensor(0.3)},
    "rrelu": {"lower": 0.1, "upper": 0.4},
    "elu": {"alpha": 0.7},
    "celu": {"alpha": 0.7},
    "hardtanh": {"min_val": -0.5, "max_val": 0.8},
    "hardshrink": {"lambd": 0.3},
    "softshrink": {"lambd": 0.3},
    "softplus": {"beta": 2.0, "threshold": 20.0},
    "threshold": {"threshold": 0.2, "value": -0.4},
    "clamp": {"min": -0.5, "max": 0.8},
    "clamp_min": {"min": 0.1},
    "clamp_max": {"max": 0.3},
    "gelu": {"approximate": "tanh"},
    "heaviside": {"values": torch.tensor(0.5)},
    "pow": {"exponent": 3},
    **{name: {"other": 0.4} for name in ("gt", "ge", "lt", "le")},
}
MEAN, STD, COUNT = 0.3, 1.4, 400_000


@functools.cache
def samples():
    return MEAN + STD * torch.randn(COUNT, generator=torch.Generator().manual_seed(5))


def agree(expected, y):
    """z < 5 of sampled mean and variance."""
    y = y.double()
    assert abs(y.mean() - expected.mean.detach()) < 5 * (y.var() / COUNT).sqrt()
    spread = (y - y.mean()).square()
    assert abs(spread.mean() - expected.var.detach()) < 5 * (spread.var() / COUNT).sqrt()


def parameters_of(row):
    return ARGUMENTS.get(row.name, {})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_one_row_is_one_activation(row):
    """Its module, and every function and method by which it is met, are one name with one pair of moments; by sampling."""
    parameters = parameters_of(row)
    expected = moments(row.name, MEAN, STD) if not parameters else activation_moments(row.name, MEAN, STD, **parameters)
    met = [*row.functions, *(getattr(torch.Tensor, name) for name in row.methods)]
    if row.module is not None:
        module = nn.PReLU(init=0.3) if row.name == "prelu" else row.module(**parameters)
        found = moments(module.eval(), MEAN, STD)
        torch.testing.assert_close(found.mean.detach().double().squeeze(), expected.mean.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found.var.detach().double().squeeze(), expected.var.detach(), rtol=1e-6, atol=0.0)
        met.append(module)
    assert met
    for operation in met:
        name, given = canonical(operation)
        assert name == row.name
        keywords = {} if isinstance(operation, nn.Module) else parameters
        with torch.no_grad():
            y = call(operation, samples().clone(), keywords)
        agree(expected, y)
        assert set(given) <= set(row.parameters)


def call(operation, x, keywords):
    """An operation with parameters by position, as torch has no keywords for some of them."""
    if operation is F.gelu:
        return operation(x, **keywords)
    if operation in (torch.prelu, F.prelu, torch.Tensor.prelu):
        return operation(x, keywords["weight"].reshape(1))
    return operation(x, *keywords.values())


def test_no_two_rows_claim_a_spelling():
    spellings = [f for row in ROWS for f in (*row.functions, *row.methods, row.module) if f is not None]
    names = [name for row in ROWS for name in (row.name, *row.also, *row.aliases)]
    assert len(names) == len(set(names))
    assert len(spellings) == len(set(spellings))


def test_every_elementwise_activation_module_of_torch_has_a_row():
    elsewhere = {"GLU", "MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}  # over several elements
    assert set(nn.modules.activation.__all__) - elsewhere <= {row.module.__name__ for row in ROWS if row.module}


def test_every_form_has_a_row():
    from normprop.activations import closed_forms, piecewise_forms, smooth_forms, step_forms

    forms = {
        function
        for space in (closed_forms, piecewise_forms, smooth_forms, step_forms)
        for name, function in vars(space).items()
        if name[0] != "_" and inspect.isfunction(function) and getattr(function, "__module__", "") == space.__name__
    }
    assert forms == {row.form for row in ROWS}


@pytest.mark.parametrize(
    ("name", "parameters", "function"), list(written_values()), ids=lambda x: str(x) if isinstance(x, str) else ""
)
def test_values_of_forms_are_those_of_torch(name, parameters, function):
    u = torch.linspace(-9.03, 9.11, 301, dtype=torch.float64)
    row = ACTIVATIONS[name]
    real = row.module().double() if name in ("identity", "prelu") else row.functions[0]
    parameters = dict(parameters) | ({"min": -math.inf} if name == "clamp" else {})
    if name == "heaviside":
        real = functools.partial(torch.heaviside, values=u.new_zeros(()))
    torch.testing.assert_close(function(u), real(u, **parameters), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["clamp", "clamp_min", "clamp_max", "gt", "lt", "prelu"])
def test_parameters_per_channel(name):
    """As one channel at a time, with gradients by the parameters."""
    columns = {"min": [-1.0, 0.2, 0.5], "max": [0.5, 0.3, 0.1], "other": [0.0, 1.0, -2.0], "weight": [0.1, 0.5, -0.3]}
    wanted = ("min", "max") if name == "clamp" else ACTIVATIONS[name].parameters
    tensors = {key: torch.tensor(columns[key], dtype=torch.float64, requires_grad=True) for key in wanted}
    found = activation_moments(name, 0.3, 0.8, **tensors)
    for i in range(3):
        alone = activation_moments(name, 0.3, 0.8, **{key: columns[key][i] for key in wanted})
        assert found.mean[i].item() == pytest.approx(alone.mean.item(), rel=1e-12)
        assert found.var[i].item() == pytest.approx(alone.var.item(), rel=1e-12)
    if name != "clamp":  # whose bounds cross in one channel
        (tensor,) = tensors.values()
        pick = lambda t: [getattr(activation_moments(name, 0.3, 0.8, **{wanted[0]: t}), field) for field in ("mean", "var")]
        assert torch.autograd.gradcheck(lambda t: tuple(pick(t)), (tensor,))


FUNCTIONS = [
    (F.relu, "relu", {}),
    (torch.relu, "relu", {}),
    (torch.Tensor.relu, "relu", {}),
    (torch.relu_, "relu", {}),
    (F.silu, "silu", {}),
    (F.gelu, "gelu", {}),
    (torch.sigmoid, "sigmoid", {}),
    (torch.special.expit, "sigmoid", {}),
    (F.hardtanh, "hardtanh", {}),
    (abs, "abs", {}),
    (torch.clip, "clamp", {}),
    (functools.partial(F.leaky_relu, negative_slope=0.2, inplace=True), "leaky_relu", {"negative_slope": 0.2}),
    (functools.partial(functools.partial(F.elu, alpha=0.2), alpha=0.4), "elu", {"alpha": 0.4}),
    (nn.Softplus(beta=2.0), "softplus", {"beta": 2.0, "threshold": 20.0}),
    (nn.GELU("tanh"), "gelu", {"approximate": "tanh"}),
    (nn.ReLU6(), "relu6", {}),
    (nn.ReLU, "relu", {}),
    ("swish", "silu", {}),
    ("torch.special.erf", "erf", {}),
]


@pytest.mark.parametrize(("fn", "name", "parameters"), FUNCTIONS)
def test_canonical(fn, name, parameters):
    assert canonical(fn) == (name, parameters)


def test_canonical_of_prelu_hands_out_the_parameter_itself():
    module = nn.PReLU(3)
    name, parameters = canonical(module)
    assert name == "prelu"
    assert parameters["weight"] is module.weight


class KeepsForward(nn.ReLU6):
    pass


class Overrides(nn.ReLU):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "fn", [Overrides(), Overrides, lambda u: u, nn.Linear(2, 2), nn.Linear, 3, [1], functools.partial(torch.pow, 2)]
)
def test_canonical_knows_what_it_does_not_know(fn):
    assert canonical(fn) is None


def test_subclasses():
    assert canonical(KeepsForward()) == ("relu6", {})
    assert moments(Overrides()).mean == pytest.approx(2 * moments("relu").mean.item(), rel=1e-12)


def test_softplus_with_a_visible_jump_is_refused_and_works_as_a_callable():
    with pytest.raises(NormPropError, match="jumps visibly"):
        moments(nn.Softplus(threshold=1.0))
    result = moments(lambda u: F.softplus(u, threshold=1.0))
    assert result.slope == float("inf")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("swich", {}, "did you mean swish"),
        ("softmax", {}, "not elementwise"),
        ("relu", {"alpha": 1.0}, "no parameter alpha"),
        ("threshold", {}, "needs its parameters: threshold, value"),
        ("hardtanh", {"min_val": 1.0, "max_val": 0.0}, "not below"),
        ("gelu", {"approximate": "fast"}, "'none' or 'tanh'"),
        ("pow", {"exponent": 0.5}, "no closed form"),
    ],
)
def test_errors(name, parameters, message):
    with pytest.raises(NormPropError, match=message):
        activation_moments(name, 0.0, 1.0, **parameters)
