"""Calibration while training: the function stays, predictions are right again, momenta go along."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normprop
from normprop import NormPropError
from normprop.sites.site import Site
from tests.test_calibrate import images
from tests.zoo import Residual


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, count: int) -> None:
    torch.manual_seed(1)
    y = torch.randint(5, (len(x),))
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True)],
    ids=["SGD", "Adam"],
)
def test_the_function_stays_and_momenta_go_along(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = normprop.calibrate(normprop.convert(Residual().double()), images(64))
    optimizer = make(p for p in model.parameters() if p.requires_grad)
    steps(model, optimizer, images(64), 20)
    x = images(8)
    before = model(x)
    sites = {k: m for k, m in model.named_modules() if isinstance(m, Site)}
    old = {k: (m.weight.detach().clone(), m.bias.detach().clone()) for k, m in sites.items()}
    states = {k: [copy.deepcopy(optimizer.state[p]) for p in (m.weight, m.bias)] for k, m in sites.items()}
    assert normprop.recalibrate(model, optimizer, images(64)) is model
    torch.testing.assert_close(model(x), before)
    for k, site in sites.items():
        s, c = (site.weight / old[k][0]).detach(), ((site.bias - old[k][1]) / old[k][0]).detach()
        assert float((s - 1).abs().max()) > 1e-3
        for key, value in optimizer.state[site.weight].items():
            of_gamma, of_beta = (state[key] for state in states[k])
            if key != "step":
                torch.testing.assert_close(value, of_gamma / s**2 if "sq" in key else (of_gamma - c * of_beta) / s)
                assert torch.equal(optimizer.state[site.bias][key], of_beta)


def test_momenta_become_those_of_the_gradients_that_would_have_been() -> None:
    """Of the last site, whose γ and β no other one reads."""
    torch.manual_seed(0)
    model = normprop.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    site = model.get_submodule("1")
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        model(images(6)).square().mean().backward()
        found.append([p.grad.clone() for p in (site.weight, site.bias)])
        if len(found) == 1:
            optimizer.step()
            normprop.recalibrate(model, optimizer, images(64) + 0.5)
    for parameter, gradient in zip((site.weight, site.bias), found[1], strict=True):
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], gradient)
    assert float((found[0][0] / found[1][0] - 1).abs().max()) > 0.1


def test_predictions_are_right_again() -> None:
    torch.manual_seed(0)
    model = normprop.calibrate(normprop.convert(Residual().double()), images(64))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    steps(model, optimizer, images(64), 40)

    def worst() -> float:
        rows = [row for row in normprop.inspect(model, images(64)) if row.operation == "Site"]
        return max(float((row.measured.var / row.predicted.var).log().abs().max()) for row in rows)

    drifted = worst()
    assert drifted > 0.1
    normprop.recalibrate(model, optimizer, images(64))
    assert worst() < 1e-6


def test_a_zero_gain_stays_zero() -> None:
    torch.manual_seed(0)
    network = Residual().double()
    nn.init.zeros_(network.bn2.weight)
    model = normprop.convert(network)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    before = model(images(4))
    normprop.recalibrate(model, optimizer, images(64))
    torch.testing.assert_close(model(images(4)), before)
    assert not model.get_parameter("bn2.weight").any()
    steps(model, optimizer, images(16), 2)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_bad_input() -> None:
    model = Residual()
    with pytest.raises(NormPropError, match="network that convert made"):
        normprop.recalibrate(model, torch.optim.SGD(model.parameters(), lr=0.1), images(4))
