import copy
import functools
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normprop.activations.activation_moments import ActivationMoments, activation_moments, module_moments, moments
from normprop.errors import NormPropError

NAMES = ["relu", "leaky_relu", "hardtanh", "hardswish", "softshrink", "gelu", "silu", "elu", "tanh", "sigmoid", "sin"]
FIELDS = ("mean", "var", "second", "slope", "mean_slope")
means = st.floats(-1e3, 1e3)
stds = st.floats(1e-3, 1e3)


def numbers(name: str, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, ...]:
    result = activation_moments(name, mean, std)
    return tuple(getattr(result, field) for field in FIELDS)


def gaussian(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.rand, *shape, generator=generator, dtype=torch.float64)
    return 3 * draw() - 1.5, draw() + 0.5


def test_remarks_1_and_2_of_the_paper():
    relu = moments("relu")
    assert relu.mean.item() == pytest.approx(1 / math.sqrt(2 * math.pi), rel=1e-14)
    assert relu.var.item() == pytest.approx((1 - 1 / math.pi) / 2, rel=1e-13)
    assert relu.gain.item() == pytest.approx(1 / 0.583819, rel=1e-6)
    a = 0.3
    prelu = moments(nn.PReLU(init=a).double())
    assert prelu.mean.item() == pytest.approx((1 - a) / math.sqrt(2 * math.pi), rel=1e-6)
    assert prelu.var.item() == pytest.approx(((1 + a * a) - (1 - a) ** 2 / math.pi) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "factor"), [("relu", 1.467), ("gelu", 1.319), ("silu", 1.212), ("tanh", 1.178), ("elu", 1.079)]
)
def test_slope_over_variance_of_common_activations(name, factor):
    result = moments(name)
    assert (result.slope / result.var).item() == pytest.approx(factor, abs=6e-4)


@pytest.mark.parametrize("name", ["linear", "relu", "leaky_relu"])
def test_calculate_gain_is_the_inverse_root_of_the_second_moment(name):
    assert moments(name).second.rsqrt().item() == pytest.approx(nn.init.calculate_gain(name), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name):
    mean, std = gaussian(3)
    mean[0] = 0.0
    inputs = mean.requires_grad_(), std.requires_grad_()
    assert torch.autograd.gradcheck(functools.partial(numbers, name), inputs)
    assert torch.autograd.gradgradcheck(functools.partial(numbers, name), inputs)


def test_derivatives_by_the_slope_of_prelu():
    mean, std = gaussian(3)
    weight = torch.tensor([0.25, -0.5, 1.5], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (mean, std, weight)]
    f = lambda m, s, w: tuple(getattr(activation_moments("prelu", m, s, weight=w), field) for field in FIELDS)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_prelu_of_many_channels_broadcasts_against_vectors_and_maps():
    module = nn.PReLU(3)
    assert module_moments(module, torch.zeros(3), torch.ones(3)).mean.shape == (3,)
    field = activation_moments("prelu", torch.zeros(2, 3, 4, 4), 1.0, weight=module.weight.reshape(1, 3, 1, 1))
    field.var.sum().backward()
    assert module.weight.grad.shape == (3,)
    torch.testing.assert_close(field.var[0, :, 0, 0], module_moments(module, torch.zeros(3), torch.ones(3)).var)


# torch.compile imports modules of torch that call what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_vmap_grad_and_compile_agree_with_eager(name):
    mean, std = gaussian(5)
    f = lambda m, s: activation_moments(name, m, s).var + activation_moments(name, m, s).mean
    torch.testing.assert_close(torch.func.vmap(f)(mean, std), f(mean, std), rtol=1e-12, atol=1e-15)
    leaf = mean.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf, std).sum(), leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(mean, std), expected, rtol=1e-10, atol=1e-14)
    _, forward = torch.func.jvp(f, (mean, std), (torch.ones_like(mean), torch.zeros_like(std)))
    torch.testing.assert_close(forward, expected, rtol=1e-10, atol=1e-14)
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mean, std), f(mean, std), rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_function_without_a_form_compiles_before_it_ran():
    torch.compiler.reset()
    f = lambda m, s: activation_moments("torch.special.i0e", m, s).var
    mean, std = gaussian(3, seed=1)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(mean, std)
    torch.testing.assert_close(compiled, f(mean, std), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["relu", "hardswish", "gelu"])
def test_export(name):
    class Lane(nn.Module):
        def forward(self, mean, std):
            return activation_moments(name, mean, std).var

    mean, std = gaussian(6)
    with warnings.catch_warnings():
        # torch's own exporter warns about torch's own code.
        warnings.simplefilter("ignore")
        program = torch.export.export(Lane(), (mean, std)).module()
    torch.testing.assert_close(program(mean, std), Lane()(mean, std))


@pytest.mark.parametrize("name", NAMES)
@given(mean=means, std=stds)
@settings(max_examples=25, deadline=None)
def test_second_moment_is_variance_plus_squared_mean(name, mean, std):
    r = activation_moments(name, mean, std)
    assert r.var >= 0
    assert r.second.item() == pytest.approx((r.var + r.mean**2).item(), rel=1e-9, abs=1e-290)
    assert all(getattr(r, field).isfinite() for field in FIELDS)


@given(mean=means, std=stds, scale=st.floats(1e-2, 1e2))
@settings(max_examples=50, deadline=None)
def test_relu_splits_the_identity_and_is_homogeneous(mean, std, scale):
    plus, minus = moments("relu", mean, std), moments("relu", -mean, std)
    assert (plus.mean - minus.mean).item() == pytest.approx(mean, rel=1e-10, abs=1e-12 * std)
    assert (plus.second + minus.second).item() == pytest.approx(mean**2 + std**2, rel=1e-10)
    scaled = moments("relu", scale * mean, scale * std)
    assert scaled.mean.item() == pytest.approx(scale * plus.mean.item(), rel=1e-9, abs=1e-300)
    assert scaled.slope.item() == pytest.approx(plus.slope.item(), rel=1e-9, abs=1e-300)


@given(mean=st.floats(-20, 20), std=st.floats(1e-2, 20))
@settings(max_examples=25, deadline=None)
def test_odd_functions(mean, std):
    for name in ("tanh", "hardtanh", "softsign", "sin", "erf"):
        there, back = moments(name, mean, std), moments(name, -mean, std)
        assert there.mean.item() == pytest.approx(-back.mean.item(), rel=1e-9, abs=1e-13)
        assert there.var.item() == pytest.approx(back.var.item(), rel=1e-9, abs=1e-290)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_comes_back_as_float32(dtype):
    mean, std = (x.to(dtype) for x in gaussian(7))
    for name in NAMES:
        low, high = activation_moments(name, mean, std), activation_moments(name, mean.double(), std.double())
        assert low.var.dtype == torch.float32
        torch.testing.assert_close(low.var.double(), high.var, rtol=1e-5, atol=0)
    assert moments("relu", torch.tensor(1), torch.tensor(2)).mean.dtype == torch.float32
    assert moments("relu", 1, 2).mean.dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_extreme_scales_give_neither_nan_nor_inf(name):
    for dtype in (torch.float64, torch.float32):
        mean = torch.tensor([0.0, 1.0, -1.0, 30.0, -30.0, 1e3, -1e3], dtype=dtype).requires_grad_()
        for std in (0.0, 1e-30, 1e-6, 1e-3, 1.0, 1e3):
            result = numbers(name, mean, torch.full_like(mean, std).requires_grad_())
            assert all(x.isfinite().all() for x in result), std
            # The slope of a kink's slope is infinite without spread; what a layer is normalised by is not.
            (slope,) = torch.autograd.grad(sum(x.sum() for x in result[:3]), mean)
            assert slope.isfinite().all(), std


@pytest.mark.parametrize("name", [n for n in NAMES if n != "softshrink"])
def test_zero_std_gives_the_function_itself(name):
    f = torch.sin if name == "sin" else getattr(F, name)
    mean = torch.tensor([-2.2, -0.7, 0.4, 3.3], dtype=torch.float64, requires_grad=True)
    result = moments(name, mean, 0.0)
    (slope,) = torch.autograd.grad(f(mean).sum(), mean)
    torch.testing.assert_close(result.mean, f(mean))
    torch.testing.assert_close(result.slope, slope.square())
    torch.testing.assert_close(result.mean_slope, slope)
    assert (result.var == 0).all()


def test_variance_at_a_small_std_keeps_its_digits():
    for name in ("silu", "gelu", "mish", "softplus", "elu"):
        assert moments(name, 50.0, 1e-3).var.item() == pytest.approx(1e-6, rel=1e-12)
        generic = lambda u, name=name: getattr(F, name)(u)
        assert moments(generic, 50.0, 1e-3).var.item() == pytest.approx(1e-6, rel=1e-10)


CALLABLES = [
    (lambda u: torch.where(u > 1, u.square(), -u), False),
    (lambda u: u * u.clamp(-1, 1), False),
    (lambda u: torch.sin(3 * u) + 0.1 * u.abs(), False),
    (lambda u: u.floor(), True),
    (nn.Sequential(nn.ReLU(), nn.Tanh()), False),
    (torch.special.i0, False),
]


@pytest.mark.parametrize(("fn", "jumps"), CALLABLES)
def test_any_callable_against_monte_carlo(fn, jumps):
    mean, std = torch.tensor([0.2, -1.0], dtype=torch.float64), torch.tensor([0.8, 0.5], dtype=torch.float64)
    result = moments(fn, mean, std)
    count = 400_000
    u = mean + std * torch.randn(count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f = fn(u)
    assert ((f.mean(0) - result.mean).abs() < 5 * (f.var(0) / count).sqrt()).all()
    spread = (f - f.mean(0)).square()
    assert ((spread.mean(0) - result.var).abs() < 5 * (spread.var(0) / count).sqrt()).all()
    assert result.slope.isinf().all() if jumps else (result.error < 1e-9).all()


def test_fast_oscillation_has_an_honest_error():
    f = lambda u: torch.sin(5000 * u)
    result = moments(f)
    assert abs(result.mean.item()) <= result.error.item()
    assert abs(result.second.item() - 0.5) <= result.error.item()


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (torch.log, "NaN where the Gaussian has mass"),
        (lambda u: torch.exp(u * u), "grows too fast"),
        (lambda u: u.softmax(-1), "not elementwise"),
        (lambda u: u.sum(), "changes the shape"),
        (nn.GLU(), "changes the shape"),
        (lambda u: u - u.mean(), "not elementwise"),
        (F.dropout, "random"),
        (nn.Linear(3, 3), "cannot be applied"),
        (3, "neither the name"),
        ("no_such_activation", "unknown activation"),
    ],
)
def test_what_cannot_be_answered_is_explained(fn, message):
    with pytest.raises(NormPropError, match=message):
        moments(fn)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.0, -1.0, "negative"),
        (0.0, math.nan, "NaN"),
        (math.nan, 1.0, "NaN"),
        (torch.tensor(1j), 1.0, "complex"),
        (torch.zeros(2), torch.tensor([1.0, -1.0]), "negative"),
    ],
)
def test_bad_gaussians(mean, std, message):
    with pytest.raises(NormPropError, match=message):
        moments("relu", mean, std)


def test_log_far_from_zero_is_fine():
    assert moments(torch.log, 20.0, 1.0).mean.item() == pytest.approx(math.log(20) - 1 / 800, abs=1e-5)


def test_empty_tensors():
    empty = torch.zeros(0, 3)
    assert moments("relu", empty, empty).mean.shape == (0, 3)
    assert moments("gelu", empty, empty).mean.shape == (0, 3)
    assert moments(lambda u: u.atan(), empty, empty).mean.shape == (0, 3)


def test_broadcasting():
    result = moments("gelu", torch.zeros(3, 1), torch.ones(4))
    assert all(getattr(result, field).shape == (3, 4) for field in (*FIELDS, "error", "gain"))


def test_is_a_frozen_value():
    result = moments("relu")
    with pytest.raises(AttributeError):
        result.mean = 0.0
    again = pickle.loads(pickle.dumps(copy.deepcopy(result)))
    assert isinstance(again, ActivationMoments)
    assert again.var == result.var
