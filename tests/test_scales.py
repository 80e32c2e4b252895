from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from normprop.native.library import library
from normprop.native.operands import prepare
from normprop.sites import c_engine as native_scales
from normprop.sites import engine as scales
from normprop.sites import torch_engine
from normprop.sites.reference import Scale, plain_scale
from normprop.sites.rows import Form, Operands

DOUBLE = torch.float64
FORMS = [
    Form(groups, transposed, 4 if transposed else 1, center)
    for groups, transposed, center in itertools.product((1, 2), (False, True), (0.0, 0.75, 1.0))
]


def slow(form: Form, given: Operands) -> tuple[Tensor | None, Tensor, Tensor]:
    """The arithmetic of sites, a filter at a time, in the plainest operations: filters (or None), factor, offset."""
    factors, offsets, filters = [], [], []
    count = len(given.gamma)
    for o in range(count):
        if given.weight is None:
            assert given.mean is not None
            assert given.var is not None
            first, second = given.mean.reshape(-1)[o], given.var.reshape(-1)[o]
        else:
            group, inside = divmod(o, count // form.groups)
            size = given.weight.shape[0] // form.groups
            w = given.weight[group * size : (group + 1) * size, inside] if form.transposed else given.weight[o]
            w = w - form.center * w.mean()
            inputs = slice(group * len(w), (group + 1) * len(w))
            shape = (-1, *[1] * (w.dim() - 1))
            mean = torch.zeros(len(w), dtype=DOUBLE) if given.mean is None else given.mean.reshape(-1)[inputs]
            var = torch.ones(len(w), dtype=DOUBLE) if given.var is None else given.var.reshape(-1)[inputs]
            first = form.share * (w * mean.reshape(shape)).sum()
            second = form.share * (w.square() * var.reshape(shape)).sum()
            if given.directions is not None:
                for direction in given.directions.chunk(form.groups)[group]:
                    second = second + (w * var.sqrt().reshape(shape) * direction).sum() ** 2
            filters.append(w)
        factor = given.gamma[o] / torch.sqrt(given.scale[o] * second)
        factors.append(factor)
        offsets.append(given.beta[o] - (first + given.shift[o] * torch.sqrt(second)) * factor)
        if filters:
            filters[-1] = filters[-1] * factor
    if given.weight is None:
        return None, torch.stack(factors), torch.stack(offsets)
    effective = torch.stack(filters)
    if form.transposed:
        effective = effective.unflatten(0, (form.groups, -1)).transpose(1, 2).flatten(0, 1)
    return effective, torch.stack(factors), torch.stack(offsets)


def layer(
    form: Form,
    *,
    taps: tuple[int, ...] = (3, 2),
    moments: str = "mean var",
    out: int = 6,
    inside: int = 4,
    directions: int = 0,
) -> Operands:
    shape = (inside, out // form.groups) if form.transposed else (out, inside // form.groups)
    leaf = lambda t: t.requires_grad_()
    return Operands(
        leaf(torch.randn(*shape, *taps, dtype=DOUBLE) + 0.2),
        leaf(torch.randn(1, inside, 1, 1, dtype=DOUBLE)) if "mean" in moments else None,
        leaf(torch.rand(inside, dtype=DOUBLE) + 0.1) if "var" in moments else None,
        *(leaf(torch.randn(out, dtype=DOUBLE)) for _ in range(2)),
        torch.randn(out, dtype=DOUBLE),
        torch.rand(out, dtype=DOUBLE) + 0.5,
        torch.randn(directions * form.groups, *shape[1:], *taps, dtype=DOUBLE) if directions else None,
    )


def no_layer(channels: int = 5) -> Operands:
    mean, var, gamma, beta = (torch.rand(channels, dtype=DOUBLE).add_(0.1).requires_grad_() for _ in range(4))
    return Operands(
        None, mean, var, gamma, beta, torch.randn(channels, dtype=DOUBLE), torch.rand(channels, dtype=DOUBLE) + 0.5
    )


def effective(scale: Scale) -> tuple[Tensor | None, Tensor]:
    """Effective filters, or the factor of a site without a layer, and the offset."""
    return scale.factor if scale.weight is None else scale.weight, scale.offset


def check(forms: Sequence[Form], given: Sequence[Operands]) -> None:
    found = [t for scale in scales.scales(forms, given) for t in effective(scale)]
    expected = []
    for form, one in zip(forms, given, strict=True):
        filters, factor, offset = slow(form, one)
        expected += [factor if filters is None else filters, offset]
    leaves = [t for one in given for t in one if t is not None and t.requires_grad]
    weights = [torch.randn_like(t) for t in expected]
    gradients = [torch.autograd.grad(out, leaves, [w.clone() for w in weights]) for out in (found, expected)]
    for a, b in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=["small", "large", "small native", "large native"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the layers of a test count as small or as large ones, handled in several blocks, and by whom."""
    torch.manual_seed(0)
    if "native" not in request.param:
        monkeypatch.setattr(scales, "handles", lambda tensors, dtype: False)
    elif isinstance(library(), str):
        pytest.skip(str(library()))
    if "large" in request.param:
        monkeypatch.setattr(torch_engine, "_SMALL", 0)
        monkeypatch.setattr(native_scales, "_DIVIDED", 0)
    return str(request.param)


@pytest.mark.parametrize("moments", ["mean var", "var", ""])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_fast_is_slow_in_value_and_gradient(form: Form, moments: str, size: str) -> None:
    given = [layer(form, moments=moments), layer(form, moments=moments), layer(form, moments=moments, out=8), no_layer()]
    check([form] * 3 + [Form()], given)


@pytest.mark.parametrize("moments", ["mean var", "var", ""])
@pytest.mark.parametrize("form", [form for form in FORMS if not form.transposed], ids=str)
def test_layers_with_directions(form: Form, moments: str, size: str) -> None:
    given = [layer(form, moments=moments, directions=n) for n in (3, 3, 1, 0)]
    check([form] * 4, given)


@pytest.mark.parametrize("center", [0.0, 0.75, 1.0])
def test_linear_layers_and_mixtures(center: float, size: str) -> None:
    form, plain = Form(center=center), Form()
    given = [layer(form, taps=()), no_layer(), layer(plain, taps=(3,)), layer(form, taps=()), layer(plain, moments="")]
    check([form, plain, plain, form, plain], given)


@pytest.mark.parametrize("center", [0.0, 0.75, 1.0])
def test_channels_last_weights(center: float, size: str) -> None:
    form = Form(center=center)
    given = []
    for one in (layer(form), layer(form), layer(form, directions=2)):
        assert one.weight is not None
        weight = one.weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        given.append(one._replace(weight=weight))
    check([form] * 3, given)
    scale = scales.scales([form], given[:1])[0]
    assert scale.weight is not None
    assert scale.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("directions", [0, 2])
@pytest.mark.parametrize("form", [Form(), Form(center=True), Form(2), Form(2, True, 2)], ids=str)
def test_first_and_second_derivatives(form: Form, directions: int, size: str) -> None:
    given = [layer(form, taps=(2,), out=4, directions=0 if form.transposed else directions), no_layer(2)]
    names = [[k for k in Operands._fields if (t := getattr(one, k)) is not None and t.requires_grad] for one in given]
    leaves = [getattr(one, k) for one, few in zip(given, names, strict=True) for k in few]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        sites = [one._replace(**{k: next(rest) for k in few}) for one, few in zip(given, names, strict=True)]
        forms = [form, Form()]
        return tuple(t for s in scales.scales(forms, sites) for t in effective(s) if t is not None)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_transforms_give_what_eager_mode_gives(size: str) -> None:
    form = Form(center=True)
    given = layer(form)
    assert given.weight is not None

    def total(weight: Tensor) -> Tensor:
        filters, offset = effective(scales.scales([form], [given._replace(weight=weight)])[0])
        assert filters is not None
        return filters.square().sum() + offset.square().sum()

    weights = torch.randn(3, *given.weight.shape, dtype=DOUBLE)
    together = torch.func.vmap(torch.func.grad(total))(weights)
    for one, weight in zip(together, weights, strict=True):
        leaf = weight.clone().requires_grad_()
        torch.testing.assert_close(one, torch.autograd.grad(total(leaf), leaf)[0])


@pytest.mark.skipif(isinstance(library(), str), reason=str(library()))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_traced_graphs_keep_the_compiled_function_whole(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    monkeypatch.setattr(scales, "_WHOLE", 0)
    prepare()
    given = [layer(form), layer(form, moments="var", out=8, directions=0 if form.transposed else 2), no_layer()]
    forms = [form, form, Form()]
    flat = [t for one in given for t in one if t is not None]
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        sites = [Operands(*(t if t is None else next(rest) for t in one)) for one in given]
        found = scales.scales(forms, sites)
        return tuple(t for s in found for t in effective(s) if t is not None)

    expected = function(*flat)
    traced = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=backend))(*flat)
    assert sum(node.target is torch.ops.normprop.scales.default for node in graphs[0].graph.nodes) == 1
    leaves = [t for t in flat if t.requires_grad]
    weights = [torch.randn_like(t) for t in expected]
    gradients = [torch.autograd.grad(out, leaves, [w.clone() for w in weights]) for out in (expected, traced)]
    for a, b in zip((*expected, *gradients[0]), (*traced, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(isinstance(library(), str), reason=str(library()))
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check looks at one
def test_the_operations_are_what_torch_expects_of_operations() -> None:
    given = [layer(Form(), directions=2), layer(Form(2, True, 2, True)), no_layer()]
    codes = [1, 0, 1, 0, 2, 1, 2, 1, 1, 0, 1, 0]
    present = [t is not None for one in given for t in one]
    tensors = [t for one in given for t in one if t is not None]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.normprop.scales.default, (codes, present, tensors), test_utils=checks)


@pytest.mark.parametrize("directions", [0, 2])
@pytest.mark.parametrize("constant", [0.0, 0.7])
def test_what_has_no_variance_has_finite_gradients(constant: float, directions: int, size: str) -> None:
    form = Form(center=True)
    given = layer(form, directions=directions)
    assert given.weight is not None
    assert given.var is not None
    with torch.no_grad():
        given.weight[0] = constant
        given.var[0] = 0.0
    filters, offset = effective(scales.scales([form], [given])[0])
    assert filters is not None
    leaves = [t for t in given if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(filters.square().sum() + offset.square().sum(), leaves)
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_unused_outputs_and_frozen_weights(size: str) -> None:
    form = Form(center=True)
    frozen = layer(form)
    assert frozen.weight is not None
    given = [frozen._replace(weight=frozen.weight.detach()), layer(form)]
    first, second = scales.scales([form, form], given)
    assert given[0].gamma.grad is None
    first.offset.sum().backward()
    assert given[0].gamma.grad is not None
    assert second.offset.requires_grad


def test_a_backward_pass_writes_to_no_gradient_that_somebody_holds(size: str) -> None:
    weight = torch.randn(6, 4, 3, 3, dtype=DOUBLE, requires_grad=True)
    given = layer(Form(), taps=(3, 3))._replace(weight=weight)
    scale = scales.scales([Form()], [given])[0]
    x = torch.randn(2, 4, 5, 5, dtype=DOUBLE)
    assert scale.weight is not None
    y = torch.nn.functional.conv2d(x, scale.weight).square().sum() + scale.offset.sum()
    first = torch.autograd.grad(y, weight, retain_graph=True)[0]
    copy = first.clone()
    again = torch.autograd.grad(y, weight)[0]
    torch.testing.assert_close(first, copy, rtol=0, atol=0)
    torch.testing.assert_close(first, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3])
@pytest.mark.parametrize("fan_in", [64, 2000, 5000])
def test_centred_filters_of_equal_weights_have_no_variance(fan_in: int, value: float, dtype: torch.dtype, size: str) -> None:
    form = Form(center=True)
    weight = torch.full((4, fan_in), value, dtype=dtype, requires_grad=True)
    ones, zeros = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    plain = Operands(weight, None, None, ones, zeros, zeros, ones)
    for given in (plain, plain._replace(directions=torch.randn(3, fan_in, dtype=dtype))):
        (scale,), expected = scales.scales([form], [given]), plain_scale(form, given)
        assert scale.weight is not None
        assert expected.weight is not None
        for found in (scale.weight, expected.weight):  # one over the root of a variance that counts as one
            assert float(found.detach().abs().max()) < 1e3 * torch.finfo(dtype).eps
        (gradient,) = torch.autograd.grad(scale.weight.square().sum() + scale.offset.sum(), weight)
        assert float(gradient.abs().max()) < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("center", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variances_too_small_to_be_squared_count_as_zero(dtype: torch.dtype, center: float, size: str) -> None:
    """All gradients stay finite at every size of the weights, and of what a site without a layer normalises."""
    form, limits = Form(center=center), torch.finfo(dtype)
    smallest = round(math.log10(limits.tiny))
    for exponent in range(smallest - 5, 1, 1 if dtype == torch.float32 else 9):
        one = layer(form, directions=1)
        assert one.weight is not None
        given = [Operands(*(t if t is None else t.detach().to(dtype) for t in o)) for o in (one, no_layer())]
        given[0] = given[0]._replace(weight=one.weight.detach().to(dtype) * 10.0**exponent)
        given[1] = given[1]._replace(var=torch.full((5,), 10.0**exponent, dtype=dtype))
        given = [Operands(*(t if t is None else t.requires_grad_() for t in o)) for o in given]
        leaves = [t for o in given for t in o[:5] if t is not None]
        found = [t for s in scales.scales([form, Form()], given) for t in effective(s)]
        weights = [torch.ones_like(t) for t in found]
        # A filter's gradient is as large as the filter is small.
        weights[0] *= 10.0 ** min(0.0, exponent - smallest / 2)
        for gradient in torch.autograd.grad(found, leaves, weights):
            assert bool(gradient.isfinite().all()), exponent
        expected = [t for o, f in zip(given, (form, Form()), strict=True) for t in effective(plain_scale(f, o))]
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).abs().max().detach()) <= (1e-4 if dtype == torch.float32 else 1e-10) * float(
                b.abs().max().detach()
            )
