"""How much networks stretch differences, against mean-field theory, and the β they start at."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import Tensor, nn

import normprop
from normprop import NormPropError, NotFiniteError
from normprop.sites.site import Site
from tests.test_calibrate import images
from tests.zoo import Residual


def plain(depth: int, width: int = 64, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), act()) for _ in range(depth)]
    return nn.Sequential(*(module for layer in layers for module in layer), nn.Linear(width, 10))


def betas(model: nn.Module) -> list[float]:
    sites = [site for site in model.modules() if isinstance(site, Site)]
    return sorted({b for site in sites if site.bias is not None for b in site.bias.tolist()})


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


def mean_field(act: Callable[[Tensor], Tensor], beta: float) -> float:
    """√(E φ'(u)²(u' − u)² / E(φ(u') − φ(u))²) for independent u, u' ~ N(β, 1), by SciPy."""

    def mean(fn: Callable[[Tensor], Tensor]) -> float:
        weighted = lambda u: float(fn(torch.tensor(u, dtype=torch.double))) * stats.norm.pdf(u, beta)
        return float(integrate.quad(weighted, beta - 12, beta + 12, points=[0.0], limit=200)[0])

    def near(u: Tensor) -> Tensor:
        slope = torch.func.grad(act)(u)
        return slope.square() * (1 + (u - beta).square())

    return math.sqrt(mean(near) / (2 * (mean(lambda u: act(u).square()) - mean(act) ** 2)))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, -1.0])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_wide_layer_stretches_as_mean_field_theory_says(name: str, beta: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 4096)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(512))
    nn.init.constant_(layer.bias, beta)

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ACTIVATIONS[name](layer(x))

    assert normprop.stretch(Layer(), torch.randn(256, 512)) == pytest.approx(mean_field(ACTIVATIONS[name], beta), rel=0.01)


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 1.211), (0.5, 1.118), (1.0, 1.058), (2.0, 1.009)])
def test_a_relu_stretches_less_the_higher_beta_is(beta: float, expected: float) -> None:
    relu = normprop.moments("relu", mean=beta)
    assert math.sqrt(float(relu.slope) / float(relu.var)) == pytest.approx(expected, abs=5e-4)


def test_it_is_the_jacobian_over_the_chord() -> None:
    torch.manual_seed(0)
    net, x = plain(4, 16).double().eval().requires_grad_(False), torch.randn(8, 16, dtype=torch.double)
    far = x.roll(1, 0)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda one: net(one[None])[0]))(x)
    near = torch.einsum("noi,ni->no", jacobians, far - x).square().sum()
    expected = float((near / (net(far) - net(x)).square().sum()).sqrt())
    assert normprop.stretch(net, x) == pytest.approx(expected, rel=0.02)  # few differences of 1e-3 cross a kink
    assert normprop.stretch(nn.Sequential(net, nn.Linear(10, 3).double()), [(x, None)]) > 0


class Skipping(nn.Module):
    """A layer after the other, with a skip over each, and more than one output."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(plain(1)[:-1] for _ in range(depth))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x)
        return {"index": torch.arange(len(x)), "features": x}


def test_the_scale_of_the_output_does_not_matter_and_skips_do() -> None:
    torch.manual_seed(0)
    net, x = plain(12), torch.randn(64, 64)
    normprop.calibrate(converted := normprop.convert(net), x)
    usual = normprop.stretch(converted, x)
    converted.get_submodule("36").get_parameter("weight").data.mul_(100)
    assert normprop.stretch(converted, x) == pytest.approx(usual, rel=1e-3)
    skipping = normprop.convert(Skipping(12))
    normprop.calibrate(skipping, x)
    assert 1 < normprop.stretch(skipping, x) < usual / 2


def test_a_model_keeps_its_mode() -> None:
    net = plain(1)
    for mode in (True, False):
        assert normprop.stretch(net.train(mode), torch.randn(4, 64)) > 0
        assert net.training is mode
    assert net[1].num_batches_tracked == 0


def test_shallow_networks_start_at_0_and_are_only_calibrated() -> None:
    torch.manual_seed(0)
    model, x = normprop.convert(Residual()), images(64).float()
    expected = normprop.calibrate(normprop.convert(Residual()), x)
    expected.load_state_dict(model.state_dict())
    normprop.calibrate(expected, x, directions=2, shrinkage=0.9)
    assert normprop.init_beta_(model, [(x, None)], directions=2, shrinkage=0.9) == 0.0
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize(("depth", "beta"), [(8, 0.5), (12, 1.0)])
def test_deep_networks_start_above_0(depth: int, beta: float) -> None:
    torch.manual_seed(0)
    net, x = plain(depth), torch.randn(256, 64)
    model = normprop.convert(net)
    assert normprop.init_beta_(model, iter([x])) == beta  # a generator can be read once only
    assert normprop.stretch(model, x) <= 2.5
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.constant_(module.bias, beta)
    expected = normprop.calibrate(normprop.convert(net, preserve=False), x)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_where_no_beta_is_within_the_limit_that_of_the_least_stretch_is_taken() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    assert normprop.init_beta_(deep := normprop.convert(plain(12)), x, limit=1.0) == 1.0
    assert betas(deep) == [1.0]
    tanh = normprop.convert(plain(12, act=nn.Tanh))
    found = normprop.init_beta_(tanh, x, limit=1.0)
    assert betas(tanh) == [found]
    reached = normprop.stretch(tanh, x)
    for other in (0.0, 0.5, 1.0):
        for site in tanh.modules():
            if isinstance(site, Site):
                nn.init.constant_(site.bias, other)
        normprop.calibrate(tanh, x)
        assert normprop.stretch(tanh, x) >= reached * (1 - 1e-6)


def test_a_last_layer_that_starts_at_zero_tells_nothing() -> None:
    torch.manual_seed(0)
    net, x = plain(12), torch.randn(64, 64)
    nn.init.zeros_(net[-1].weight)
    assert normprop.init_beta_(normprop.convert(net), x) == 0.0
    with pytest.raises(NormPropError, match="same output"):
        normprop.stretch(net, x)


def test_half_precision_sees_the_same() -> None:
    torch.manual_seed(0)
    net, x = plain(4), torch.randn(256, 64)
    assert normprop.stretch(net.bfloat16(), x.bfloat16()) == pytest.approx(normprop.stretch(net.float(), x), rel=0.1)


def test_a_loaders_last_batch_may_be_a_single_sample() -> None:
    torch.manual_seed(0)
    net, x = plain(2), torch.randn(9, 64)
    assert normprop.stretch(net, x.split(4)) == pytest.approx(normprop.stretch(net, x[:8].split(4)))


def test_bad_input() -> None:
    net, x = plain(1), torch.randn(8, 64)
    with pytest.raises(NormPropError, match="two"):
        normprop.stretch(net, x[:1])
    with pytest.raises(NormPropError, match="floating"):
        normprop.stretch(nn.Embedding(3, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(NormPropError, match="same output"):
        normprop.stretch(net, x[:1].expand(8, -1))
    with pytest.raises(NormPropError, match="no data"):
        normprop.stretch(net, [])
    with pytest.raises(NotFiniteError):
        normprop.stretch(net, x * math.nan)
    net[-1].weight.data.fill_(math.inf)
    with pytest.raises(NotFiniteError):
        normprop.stretch(net, x)
    with pytest.raises(NormPropError, match="convert"):
        normprop.init_beta_(net, x)
    with pytest.raises(NormPropError, match="calibrate"):
        normprop.init_beta_(normprop.convert(nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8, affine=False))), x)
    with pytest.raises(NormPropError, match="paper"):
        normprop.init_beta_(normprop.convert(plain(1), method="paper"), x)
