from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normprop
from normprop import NormPropError
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
    worst = lambda: max(off(row) for row in normprop.inspect(model, x) if row.operation == "Site")
    error = worst()
    normprop.calibrate(model, x, directions=directions, preserve=True)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(normprop.fold(model)(x), plain)
    assert worst() < 0.01 * error or name == "pre-activation", "its last site has no γ and β to take up what was measured"


def off(row: Any) -> float:
    """How far the measured variance of a site is from the predicted one."""
    return float((row.measured.var / row.predicted.var).log().abs().max())
