from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop import NormPropError
from tests.zoo import SMALL, Residual, outputs, randomise


@pytest.mark.parametrize("name", SMALL)
def test_a_trained_network_folds_to_what_it_was(name: str) -> None:
    torch.manual_seed(0)
    make, shape = SMALL[name]
    model = randomise(make()).double().eval()
    x = torch.randn(3, *shape, dtype=torch.float64)
    folded = normprop.fold(normprop.convert(model)).eval()
    for a, b in zip(outputs(folded(x)), outputs(model(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_layers_come_back_under_their_own_paths_and_train() -> None:
    folded = normprop.fold(normprop.convert(Residual()))
    assert isinstance(folded.conv1, nn.Conv2d)
    assert isinstance(folded.get_submodule("stem.0"), nn.Conv2d)
    assert {type(m).__module__.split(".")[0] for m in folded.modules() if m is not folded} == {"torch"}
    folded(torch.randn(1, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())


def test_a_layer_called_twice_folds_if_both_calls_are_the_same() -> None:
    torch.manual_seed(0)
    model = randomise(SMALL["shared"][0]()).double().eval()
    converted, x = normprop.convert(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(normprop.fold(converted)(x)["out"], model(x)["out"])
    with torch.no_grad():
        converted.conv.weight.add_(torch.randn_like(converted.conv.weight))
    with pytest.raises(NormPropError, match="called several times"):
        normprop.fold(converted)


class HalfShared(nn.Module):
    """A convolution that is normalised at one of its two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.bn(self.conv(x))))


def test_a_layer_that_is_also_used_plain_keeps_both_forms() -> None:
    torch.manual_seed(0)
    model = randomise(HalfShared()).double().eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    converted = normprop.convert(model)
    torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(normprop.fold(converted)(x), model(x))
    assert converted.conv.bias.requires_grad


def test_the_layers_of_normprop_nn_fold_inside_any_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        normprop.nn.Conv2d(3, 4, 3, activation="relu"), nn.Flatten(), normprop.nn.Linear(4 * 36, 5, activation=nn.Tanh()),
        nn.Linear(5, 2),
    ).double()  # fmt: skip
    folded = normprop.fold(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    assert not any(type(m).__module__.startswith("normprop") for m in folded.modules())


def test_what_cannot_be_folded_is_said() -> None:
    with pytest.raises(NormPropError, match="nothing to fold"):
        normprop.fold(nn.Linear(2, 2))


def test_the_check_notices_a_difference() -> None:
    converted = normprop.convert(Residual())
    with torch.no_grad():
        converted.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NormPropError, match="differs from the original"):
        normprop.fold(converted)


def test_mode_is_kept() -> None:
    converted = normprop.convert(Residual())
    assert normprop.fold(converted.train()).training
    assert not normprop.fold(converted.eval()).training
    assert not converted.training


class HeldTwice(nn.Module):
    """A BatchNorm under two names, called by the one that comes second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.block = nn.Sequential(self.conv, self.bn, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Everywhere(nn.Module):
    """A BatchNorm behind a layer, and alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(torch.relu(x)) + self.other(x)


@pytest.mark.parametrize("make", [HeldTwice, Everywhere])
def test_normalisers_that_several_places_hold_or_call(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomise(make()).double().eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    converted = normprop.convert(model)
    torch.testing.assert_close(converted(x), model(x))
    converted.train()(x[:1]).square().sum().backward()
    folded = normprop.fold(converted.eval())
    torch.testing.assert_close(folded(x), model(x))
    assert not any(isinstance(m, nn.BatchNorm2d) or type(m).__module__.startswith("normprop") for m in folded.modules())
