"""A unit that is almost always off is not blown up: BatchNorm's ε is in the variance that a site reads from activations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop.sites.site import Site

EPS = 1e-3
CHANNELS = 6


def behind(last: Callable[[], list[nn.Module]]) -> nn.Sequential:
    """A layer whose ReLU cuts off all of some channels, and hardly anything of others; then what is looked at."""
    first = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()
    network = nn.Sequential(*first, *last()).double()
    with torch.no_grad():
        network[1].get_parameter("bias").copy_(torch.tensor([-40.0, -8.0, -6.0, -3.0, 0.0, 2.0]))
    return network


def affine() -> list[nn.Module]:
    return [nn.BatchNorm2d(CHANNELS, eps=EPS)]


def depthwise() -> list[nn.Module]:
    return [nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS), nn.BatchNorm2d(CHANNELS, eps=EPS)]


def transposed() -> list[nn.Module]:
    return [nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, stride=2, groups=CHANNELS), nn.BatchNorm2d(CHANNELS, eps=EPS)]


KINDS = [affine, depthwise, transposed]


def response(model: nn.Module) -> Tensor:
    """What a change of a channel by 1 in all taps' directions becomes at most: γ/√ε bounds it, ``(CHANNELS,)``."""
    (entry,) = (e for e in normprop.lane(model).all_entries() if e.site != "1")
    factor, _ = normprop.lane(model).function(model, entry)
    if entry.layer is None:
        return factor.abs()
    layer = model.get_submodule(entry.layer)
    share = math.prod(layer.stride) if isinstance(layer, nn.ConvTranspose2d) else 1
    return factor.abs() * (layer.get_parameter("weight").flatten(1).square().sum(1) / share).sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_gains_are_bounded_as_batch_norms_are(kind: Callable[[], list[nn.Module]]) -> None:
    torch.manual_seed(0)
    model = normprop.convert(behind(kind), center=False)
    bound = 1 / math.sqrt(EPS)
    found = response(model).detach()
    assert float(found.max()) <= bound * (1 + 1e-9)
    torch.testing.assert_close(found[0], found.new_tensor(bound), rtol=1e-6, atol=0.0)  # nothing but ε is left
    variance = normprop.moments("relu", 2.0).var
    torch.testing.assert_close(found[-1], (variance + EPS).rsqrt().to(found), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [False, True])
def test_units_that_no_sample_moved_are_calibrated_within_the_bound(
    kind: Callable[[], list[nn.Module]], again: bool
) -> None:
    torch.manual_seed(0)
    model = normprop.convert(behind(kind), center=False)
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    before = model(x)
    if again:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        normprop.recalibrate(model, optimizer, x, directions=None)
        torch.testing.assert_close(model(x), before)
        with torch.no_grad():
            model[-1].get_parameter("weight").fill_(1.0)
    else:
        normprop.calibrate(model, x)
    assert float(response(model).detach().max()) <= (1 + 1e-9) / math.sqrt(EPS)
    last = model[-1]
    assert isinstance(last, Site)
    assert bool((last.scale > 0).all())


def test_what_reads_layers_and_inputs_holds_no_epsilon() -> None:
    """There nothing is nearly constant, and nobody is to feel the scale of a layer's weight."""
    torch.manual_seed(0)
    narrow = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=6), nn.BatchNorm2d(6, eps=EPS)
    wide = nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4, eps=EPS)
    model = normprop.convert(nn.Sequential(nn.BatchNorm2d(3, eps=EPS), *narrow, *wide).double())
    assert [entry.eps for entry in normprop.lane(model).all_entries()] == [0.0, 0.0, 0.0]
    model = normprop.convert(behind(depthwise), center=False)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        model[3].get_parameter("weight").mul_(1e3)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_dead_unit_bears_a_step(kind: Callable[[], list[nn.Module]]) -> None:
    """Without ε, V of a channel at −8σ changes by more than the whole when β moves by a quarter of γ."""
    torch.manual_seed(0)
    network = behind(kind)
    for _ in range(20):
        network(torch.randn(32, 3, 8, 8, dtype=torch.float64))
    model = normprop.convert(network.eval())
    before = response(model)
    with torch.no_grad():
        model[1].get_parameter("bias").sub_(0.25)
    after = response(model)
    dead = slice(0, 3)
    torch.testing.assert_close(after[dead], before[dead], rtol=1e-2, atol=0.0)


def test_what_is_added_to_itself_again_and_again_is_followed_once() -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS, eps=EPS)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            for _ in range(60):
                x = 0.5 * (x + x.flip(3))
            return self.bn(x)

    (entry,) = normprop.lane(normprop.convert(Folding())).all_entries()
    assert entry.eps == 0.0
