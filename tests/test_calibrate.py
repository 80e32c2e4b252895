from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normprop
from normprop import NormPropError
from normprop.sites import engine
from normprop.sites.site import Site
from tests.zoo import SMALL, Residual


def images(n: int, size: int = 12) -> Tensor:
    """Smooth images: neighbouring pixels and channels correlate, so that independence is far off."""
    torch.manual_seed(1)
    coarse = torch.randn(n, 1, size // 4, size // 4) + 0.3 * torch.randn(n, 3, size // 4, size // 4)
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").double()


@pytest.mark.parametrize("name", ["residual", "pre-activation", "gated"])
def test_every_site_standardises_what_it_sees(name: str) -> None:
    torch.manual_seed(0)
    make, shape = SMALL[name]
    x = images(64, 12)[:, :, : shape[1], : shape[2]]
    model = normprop.convert(make().double())
    assert normprop.calibrate(model, x) is model
    report = normprop.inspect(model, x)
    checked = [row for row in report if row.operation == "Site"]
    assert len(checked) >= 3
    for row in checked:
        assert float(row.measured.mean.abs().max()) < 1e-6
        assert float((row.measured.var - 1).abs().max()) < 1e-6


def test_batches_of_any_size_give_the_same() -> None:
    x = images(48)
    found = []
    for data in (x, [x[:7], x[7:]], DataLoader(TensorDataset(x, torch.zeros(48)), batch_size=10)):
        torch.manual_seed(0)
        model = normprop.calibrate(normprop.convert(Residual().double()), data)
        found.append(model.state_dict())
    for other in found[1:]:
        assert all(torch.allclose(v, other[k]) for k, v in found[0].items())


def test_only_constants_change_and_the_mode_stays() -> None:
    model = normprop.convert(Residual().double()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    normprop.calibrate(model, images(8))
    changed = {k for k, v in before.items() if not torch.equal(v, model.state_dict()[k])}
    assert {k.rpartition(".")[2] for k in changed} == {"shift", "scale", "directions"}
    assert model.state_dict().keys() == before.keys()
    assert model.training


def test_what_was_calibrated_still_does_not_depend_on_the_batch() -> None:
    model = normprop.calibrate(normprop.convert(Residual().double()), images(16))
    x = images(4)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))
    torch.testing.assert_close(normprop.fold(model)(x), model(x))


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (lambda: nn.Linear(3, 3), torch.zeros(2, 3), "network that convert made"),
        (lambda: normprop.convert(Residual()), [], "no data"),
        (lambda: normprop.convert(SMALL["mlp"][0]()), torch.randn(1, 3, 4, 4), "one value per channel"),
        (lambda: normprop.convert(Residual(), method="paper"), torch.randn(4, 3, 8, 8), "no constants"),
        (lambda: normprop.convert(Residual()), torch.zeros(0, 3, 8, 8), "no data"),
        (lambda: normprop.convert(Residual()), torch.full((2, 3, 8, 8), float("nan")), "not finite"),
        (lambda: normprop.convert(Residual()), normprop.InputStats.standard(3), "holds none"),
    ],
)
def test_bad_input(model: Any, data: Any, message: str) -> None:
    with pytest.raises(NormPropError, match=message):
        normprop.calibrate(model(), data)


@pytest.mark.parametrize("preserve", [False, True])
def test_statistics_are_computed_in_full_precision_under_autocast(preserve: bool) -> None:
    torch.manual_seed(0)
    model = normprop.convert(Residual())
    plain = normprop.calibrate(copy.deepcopy(model), images(16).float(), preserve=preserve)
    with torch.autocast("cpu", torch.bfloat16):
        normprop.calibrate(model, images(16).float(), preserve=preserve)
    first = "stem.1.directions"  # behind it, what is measured went through layers in half precision
    torch.testing.assert_close(model.get_parameter(first), plain.get_parameter(first))


@pytest.mark.parametrize("directions", [0, 4])
@pytest.mark.parametrize("name", ["residual", "pre-activation", "gated"])
def test_calibration_can_keep_the_function(name: str, directions: int) -> None:
    torch.manual_seed(0)
    make, shape = SMALL[name]
    x = images(64, 12)[:, :, : shape[1], : shape[2]]
    model = normprop.calibrate(normprop.convert(make().double()), x)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    before, plain = model(x), normprop.fold(model)(x)
    taking = {path for path, site in model.named_modules() if isinstance(site, Site) and site.weight is not None}
    worst = lambda: max(off(row) for row in normprop.inspect(model, x) if row.path in taking)
    error = worst()
    normprop.calibrate(model, x, directions=directions, preserve=True)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(normprop.fold(model)(x), plain)
    assert worst() < 0.01 * error


class Reused(nn.Module):
    """A BatchNorm behind layers of different fan-in, and γ and β that two BatchNorms share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (nn.Conv2d(c, 4, 1) for c in (3, 4, 4, 4))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.bn3.weight, self.bn3.bias = self.bn2.weight, self.bn2.bias

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn1(self.conv2(x)))
        x = torch.relu(self.bn2(self.conv3(x)))
        return self.bn3(self.conv4(x)) + x


@pytest.mark.parametrize("native", ["0", "1"])
def test_sites_that_share_what_they_have(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated they standardise, and calibrated in the midst of training they keep the function."""
    monkeypatch.setattr(engine, "handles", (lambda *_: False) if native == "0" else engine.handles)
    torch.manual_seed(0)
    x = images(64)
    model = normprop.calibrate(normprop.convert(Reused().double()), x)
    for row in normprop.inspect(model, x):
        if row.operation == "Site":
            assert off(row) < 1e-6
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    before = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for again in (
        lambda: normprop.calibrate(model, x, preserve=True),
        lambda: normprop.recalibrate(model, optimizer, x),
    ):
        again()
        torch.testing.assert_close(model(x), before)
        torch.testing.assert_close(normprop.fold(model)(x), before)


def test_directions_of_another_layer_are_refused() -> None:
    model = normprop.calibrate(normprop.convert(Residual().double()), images(16))
    state = model.state_dict()
    state["bn1.directions"] = state["bn1.directions"][:, :3]
    model.load_state_dict(state)
    with pytest.raises(NormPropError, match="directions of bn1"):
        model(images(2))


def off(row: Any) -> float:
    """How far the measured variance of a site is from the predicted one."""
    return float((row.measured.var / row.predicted.var).log().abs().max())
