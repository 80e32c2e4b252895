"""Moment lanes in compiled segments beside the same lanes in torch's operations."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop.activations import fast_moments
from normprop.activations.compiled_curves import curve_moments, native_curve
from normprop.activations.fast_moments import lane_moments
from normprop.conversion.activation_setting import module_setting
from normprop.conversion.lane import Lane
from normprop.native.library import library
from tests.zoo import FAST, SMALL, build, randomise

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason=f"no compiled functions: {library()}")
FRESH: dict[str, Any] = {"preserve": False}
CASES = [(name, options) for name in SMALL for options in ({}, FRESH, {"normalize": "all"} | FRESH)]
CASES += [(name, {}) for name in FAST if "levit" not in name]


def converted(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if name in SMALL:
        network, shape = SMALL[name][0]().double(), SMALL[name][1]
        return normprop.convert(randomise(network), example=torch.zeros(2, *shape, dtype=torch.float64), **options)
    return normprop.convert(randomise(build(name).double()), **options)


def values(scales: Any) -> list[Tensor]:
    return [t for scale in scales for t in scale if t is not None]


def gradients(found: list[Tensor], parameters: list[Tensor], **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype)
    weighted = [(t, draw(t)) for t in found]
    total = sum((t * w).sum() for t, w in weighted if t.requires_grad)
    return list(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True, **options))


def both(model: nn.Module) -> Iterator[tuple[Lane, list[Tensor], list[Tensor]]]:
    """Each mode's lane, its scales in segments and without."""
    lane = normprop.lane(model)
    for mode in (True, False):
        entries = lane.entries[mode]
        if entries:
            compiled = lane.compiled(model, entries)
            assert compiled is not None
            yield lane, values(compiled.function(model)), values(lane.program(entries).function(model))


def parameters(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        size = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=tolerance * max(size, 1e-3))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_values_and_gradients(name: str, options: dict[str, Any]) -> None:
    model = converted(name, **options)
    for _, found, expected in both(model):
        close(found, expected)
        close(gradients(found, parameters(model)), gradients(expected, parameters(model)), 1e-11)


@pytest.mark.parametrize("name", SMALL)
def test_calibrated(name: str) -> None:
    """Directions, shifts and scales take part."""
    model = converted(name, preserve=False)
    normprop.calibrate(model, torch.randn(24, *SMALL[name][1], dtype=torch.float64))
    for _, found, expected in both(model):
        close(found, expected)
        close(gradients(found, parameters(model)), gradients(expected, parameters(model)), 1e-11)


@pytest.mark.parametrize("name", SMALL)
def test_second_derivatives(name: str) -> None:
    model = converted(name, preserve=False)
    for _, found, expected in both(model):
        first = [gradients(of, parameters(model), create_graph=True) for of in (found, expected)]
        close(*(gradients(some, parameters(model)) for some in first), 1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_that_somebody_holds_stay(name: str) -> None:
    """What a weight gets is written into what its filters got, unless others hold that."""
    model = converted(name, preserve=False)
    for _, found, expected in both(model):
        for some in (found, expected):
            given = [torch.ones_like(t) for t in some]
            torch.autograd.backward(some, given)
            assert all(bool((g == 1).all()) for g in given)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_memory_formats(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = converted("torchvision:resnet18").to(memory_format=torch.channels_last)
        for _, found, expected in both(model):
            close(found, expected)
            close(gradients(found, parameters(model)), gradients(expected, parameters(model)), 1e-11)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["residual", "pre-activation", "gated"])
def test_single_precision(name: str) -> None:
    model = converted(name, preserve=False).float()
    for _, found, expected in both(model):
        assert all(t.dtype == torch.float32 for t in found)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Flow(nn.Module):
    """Every operation that segments hold, between sites."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, 6, 3, padding=1, bias=False) for i in (3, 6, 6, 12, 6, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in self.layers)
        self.slope = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.norms[0](self.layers[0](x)))
        b = self.slope(self.norms[1](self.layers[1](a)))
        c = self.norms[2](self.layers[2](0.5 * a - b))
        with torch.no_grad():
            d = nn.functional.leaky_relu(c, 0.3)
        e = self.norms[3](self.layers[3](torch.cat([b * c, d + c], 1)))
        f = self.norms[4](self.layers[4](e + e))
        return self.norms[5](self.layers[5](f[:, :1] * 2)) + torch.add(a, e, alpha=0.7)


def test_every_operation() -> None:
    torch.manual_seed(1)
    model = normprop.convert(randomise(Flow().double()))
    model.slope.negative_slope = 0.05  # moments follow
    for lane, found, expected in both(model):
        assert "run_segment" in lane.compiled(model, lane.entries[True]).code
        close(found, expected)
        close(gradients(found, parameters(model)), gradients(expected, parameters(model)), 1e-11)


class Excited(nn.Module):
    """Squeeze-and-excitation by layers without a normaliser, and pooling."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, 6, 3, padding=1, bias=False) for i in (3, 6, 6, 6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in self.layers)
        self.squeeze = nn.Conv2d(6, 4, 1, bias=False)
        self.excite = nn.Conv2d(4, 6, 1, groups=2)
        self.mix = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.pool, self.most = nn.AvgPool2d(2), nn.MaxPool2d(2, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        a = self.activation(self.norms[0](self.layers[0](x)))
        gate = nn.functional.adaptive_avg_pool2d(a, 1)
        gate = nn.functional.hardsigmoid(self.excite(torch.tanh(self.squeeze(gate))))
        b = nn.functional.elu(self.norms[1](self.layers[1](self.pool(a * gate))), 0.7)
        c = nn.functional.gelu(self.norms[2](self.layers[2](self.most(self.mix(b)))), approximate="tanh")
        d = self.activation(self.norms[3](self.layers[3](c)))
        return self.norm(self.last(self.activation(self.first(d.mean((2, 3)))))) + torch.flatten(d.amax((2, 3)), 1)


ACTIVATIONS = [
    nn.Hardswish(), nn.ReLU6(), nn.Hardtanh(-0.5, 2.0), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.Mish(), nn.Softplus(2.0),
    nn.ELU(0.8), nn.CELU(1.3), nn.SELU(), nn.GELU(), nn.GELU("tanh"), nn.Softshrink(0.2), nn.LeakyReLU(0.1),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_excitation(activation: nn.Module) -> None:
    torch.manual_seed(1)
    model = normprop.convert(randomise(Excited(activation).double()), example=torch.zeros(2, 3, 12, 12).double())
    for lane, found, expected in both(model):
        assert lane.compiled(model, lane.entries[True]).code.count("run_segment(") == 1 or isinstance(
            activation, nn.Softshrink
        )
        close(found, expected)
        close(gradients(found, parameters(model)), gradients(expected, parameters(model)), 1e-11)


class Attends(nn.Module):
    """Attention written out: what softmax gave passes through operations that segments know before it averages tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.drop, self.second, self.last = nn.Dropout(0.1), nn.Conv1d(8, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        shares = self.drop((0.3 * x.transpose(1, 2) @ x).softmax(-1).contiguous())
        return self.last(self.second((shares @ x.transpose(1, 2)).transpose(1, 2)))


def test_moments_that_say_more_than_mean_and_variance() -> None:
    torch.manual_seed(0)
    model = normprop.convert(Attends().double(), example=torch.zeros(2, 3, 12, dtype=torch.float64), **FRESH)
    for _, found, expected in both(model):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    site = model.get_submodule("last")
    x = torch.randn(500, 3, 1, dtype=torch.float64) * 0.4472 + torch.randn(500, 3, 12, dtype=torch.float64) * 0.8944
    taken: list[Tensor] = []
    site.register_forward_hook(lambda *given: taken.append(given[2].detach()))
    model.eval()(x)  # tokens that correlate by 0.2
    assert 0.6 < float(taken[0].std()) < 1.5


def test_activations_that_change() -> None:
    """Other parameters, even learned ones, count as soon as they are there."""
    torch.manual_seed(1)
    model = normprop.convert(randomise(Excited(nn.ELU(0.8)).double()), example=torch.zeros(2, 3, 12, 12).double())
    before = next(found for _, found, _ in both(model))
    model.activation.alpha = 1.4
    for _, found, expected in both(model):
        close(found, expected)
        assert not torch.allclose(found[2], before[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if not isinstance(a, nn.LeakyReLU | nn.Softshrink)], ids=repr)
def test_curves(activation: nn.Module, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means and variances of all sizes, at the bends and far from them."""
    known = module_setting(activation)
    assert isinstance(known, tuple)
    curve = native_curve(*known, dtype == torch.float64)
    assert curve is not None
    sizes = [0.0, 1e-9, 1e-4, 0.03, 0.5, 1.0, 3.0, 8.0, 40.0, 900.0]
    mean, std = (
        t.flatten()
        for t in torch.meshgrid(torch.tensor([-s for s in sizes[1:]] + sizes), torch.tensor(sizes), indexing="ij")
    )
    mean, var = mean.to(dtype), std.to(dtype).square()
    found = curve_moments(curve, mean, var)
    name, settings = known
    monkeypatch.setattr(fast_moments, "handles", lambda *_: False)
    given = mean.clone().requires_grad_(), var.clone().requires_grad_()
    first, second = lane_moments(name, *given, dict(settings))
    slopes = [g for value in (first, second) for g in torch.autograd.grad(value.sum(), given, retain_graph=True)]
    # A value is as exact as f's own argument, and what a standard deviation divides is off by so much more.
    size, spread = mean.double().abs() + 1.0, var.double().sqrt().clamp(min=1e-10) + 1e-5 * mean.double().abs()
    rounding = [size, size * spread, 1.0, 1.0 / spread, size + spread, 1.0 + size / spread]
    relative = 1e-12 if dtype == torch.float64 else 1e-6
    for one, other, natural in zip(found, [first, second, *slopes], rounding, strict=True):
        assert ((one - other).abs().double() <= relative * other.abs() + 1e-13 * natural).all()


def test_a_small_network_is_one_segment() -> None:
    model = normprop.convert(nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()))))
    lane = normprop.lane(model)
    assert lane.compiled(model, lane.entries[True]).code.count("run_segment(") == 1
    assert str(lane).startswith("moment lane of Sequential: 4 sites, 1 compiled segment\n")


def test_frozen_layers_and_shared_ones() -> None:
    model = converted("shared", preserve=False)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(parameter.requires_grad and i % 3 != 0)
    for _, found, expected in both(model):
        close(gradients(found, parameters(model)), gradients(expected, parameters(model)), 1e-11)


@pytest.mark.parametrize("name", ["residual", "gated"])
def test_copies_and_pickles(name: str) -> None:
    model = converted(name)
    x = torch.randn(2, *SMALL[name][1], dtype=torch.float64)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5) if parameter.requires_grad and parameter.dim() == 1 else None
        assert not torch.allclose(other(x), y)
        assert torch.equal(model(x), y)


def test_a_layer_of_another_size_is_no_memory_error() -> None:
    model = normprop.convert(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    )
    x = torch.randn(3, 4)
    model(x)
    model[3].weight = nn.Parameter(torch.randn(8, 5))
    with pytest.raises((RuntimeError, normprop.NormPropError)):
        model(x)


def test_what_nothing_reads_gets_no_gradient() -> None:
    """Of one segment: gradients are None, not zero, where no gradient arrives."""
    model = normprop.convert(nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()))))
    lane = normprop.lane(model)
    entries = lane.entries[True]
    program = lane.compiled(model, entries)
    first, second, _ = program.function(model)
    for scale, used in ((first, "0 1"), (second, "1 3 4")):
        model.zero_grad()
        scale.weight.square().sum().backward(retain_graph=True)
        found = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert found == set(used.split())


def _halved(parameter: nn.Parameter) -> Tensor:
    parameter.data.mul_(0.5)
    return parameter.data


# What code that sets `Tensor.data` leaves there: other numbers, other memory, another order in it, half as many.
SET: dict[str, Any] = {
    "other memory": lambda p: p.data.clone() * 1.5,
    "other numbers": _halved,
    "channels last": lambda p: p.data.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p.data,
    "transposed": lambda p: p.data.transpose(0, 1) if p.dim() == 4 and p.shape[0] == p.shape[1] else p.data,
    "a view": lambda p: torch.stack([p.data, p.data], -1)[..., 1],
    "part of another": lambda p: torch.cat([p.data, p.data])[: len(p)],
}


@pytest.mark.parametrize("way", SET)
@pytest.mark.parametrize("between", ["forwards", "forward and backward"])
def test_parameters_whose_data_is_set(way: str, between: str) -> None:
    model = converted("residual", preserve=False)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    model(x).square().sum().backward()
    if between == "forwards":
        for parameter in model.parameters():
            parameter.data = SET[way](parameter)
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        for _, found, plain in both(model):
            close(found, plain)
            close(gradients(found, parameters(model)), gradients(plain, parameters(model)), 1e-11)
        return
    loss = model(x).square().sum()
    model.zero_grad()
    kept = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    del kept  # the memory that the forward read may be somebody else's from here on
    loss.backward()
    found = [p.grad for p in parameters(model)]
    model.zero_grad()
    model(x).square().sum().backward()
    for one, other in zip(found, parameters(model), strict=True):
        torch.testing.assert_close(one, other.grad)


def test_half_as_many_numbers_in_the_same_memory_are_noticed() -> None:
    model = converted("residual", preserve=False)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    model(x)
    site = model.get_submodule("bn1")
    site.weight.data = site.weight.data[: len(site.weight) // 2]  # type: ignore[union-attr]
    with pytest.raises(RuntimeError):
        model(x)


def test_a_forward_reads_modules_once_and_then_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from normprop.conversion import compiled_segment

    model = converted("residual", preserve=False)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    model(x)
    asked = []
    own = compiled_segment._read
    monkeypatch.setattr(compiled_segment, "_read", lambda *args: asked.append(1) or own(*args))
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    model(x)
    assert not asked
    site: Any = model.get_submodule("bn1")
    site.bias = nn.Parameter(site.bias.detach() + 1)
    model(x)
    assert asked == [1]
    model.float()
    model(x.float())
    assert asked == [1, 1]


def test_what_was_read_goes_with_the_network() -> None:
    import gc
    import weakref

    model = converted("residual", preserve=False)
    model(torch.randn(2, 3, 12, 12, dtype=torch.float64))
    copied = copy.deepcopy(model)
    parameter = weakref.ref(model.get_parameter("bn1.weight"))
    del model
    gc.collect()
    assert parameter() is None
    assert copied is not None
