"""Modules changed, put in and taken out after the conversion: as in the BatchNorm network, or refused, never in silence."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop import NormPropError
from tests.test_promises import close
from tests.zoo import SMALL, outputs, randomise

CHAINS = [name for name, (make, _) in SMALL.items() if isinstance(make(), nn.Sequential)]


def exchange(new: Callable[[], nn.Module]) -> Callable[[nn.Sequential, int], None]:
    def act(net: nn.Sequential, i: int) -> None:
        net[i] = new().double()

    return act


def wrap(net: nn.Sequential, i: int) -> None:
    net[i] = nn.Sequential(net[i], nn.Hardtanh())


def swap(net: nn.Sequential, i: int) -> None:
    j = (i + 3) % len(net)
    net[i], net[j] = net[j], net[i]


ACTS: dict[str, Callable[[nn.Sequential, int], object]] = {
    "identity": exchange(nn.Identity),
    "activation": exchange(nn.GELU),
    "slope": exchange(lambda: nn.LeakyReLU(0.3)),
    "insert": lambda net, i: net.insert(i, nn.Tanh()),
    "insert two": lambda net, i: (net.insert(i, nn.Tanh()), net.insert(i, nn.ReLU())),
    "pop": lambda net, i: net.pop(i),
    "pop three": lambda net, i: [net.pop(i) for _ in range(min(3, len(net) - i))],
    "wrap": wrap,
    "swap": swap,
}


def result(net: nn.Module, x: Tensor) -> list[Tensor] | None:
    """None if the network doesn't run, whatever normalises it."""
    try:
        return outputs(net(x))
    except NormPropError:
        raise
    except (RuntimeError, ValueError, IndexError):
        return None


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", CHAINS)
def test_surgery_acts_or_is_refused(name: str, act: str) -> None:
    torch.manual_seed(0)
    make, shape = SMALL[name]
    model = randomise(make()).double().eval()
    x = torch.randn(3, *shape, dtype=torch.float64)
    for i in range(len(model)):  # type: ignore[arg-type]  # a chain
        net, converted = copy.deepcopy(model), normprop.convert(model)
        ACTS[act](net, i)  # type: ignore[arg-type]
        expected = result(net, x)
        ACTS[act](converted, i)  # type: ignore[arg-type]
        if expected is None:
            continue
        with contextlib.suppress(NormPropError):
            close(converted(x), expected, 1e-9)


def test_what_nothing_follows_may_go() -> None:
    torch.manual_seed(0)
    model = randomise(SMALL["residual"][0]()).double().eval()
    x = torch.randn(3, *SMALL["residual"][1], dtype=torch.float64)
    for path, _ in model.named_children():
        net, converted = copy.deepcopy(model), normprop.convert(model)
        expected = None
        for network in (net, converted):
            network.add_module(path, nn.Identity())
        try:
            expected = net(x)
        except RuntimeError:
            continue
        if path in ("head", "fc"):
            close(converted(x), expected, 1e-9)
        else:
            with contextlib.suppress(NormPropError):
                close(converted(x), expected, 1e-9)


def test_settings_of_activations_are_the_present_ones() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(m for _ in range(4) for m in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.LeakyReLU(0.1))), nn.Linear(6, 2)
    )
    x = torch.randn(5, 6)
    for i in range(2, 12, 3):
        changed, converted = copy.deepcopy(net), normprop.convert(net)
        changed[i].negative_slope = 0.5
        converted[i].negative_slope = 0.5
        torch.testing.assert_close(converted(x), normprop.convert(changed)(x))


def test_a_path_taken_more_often_than_recorded_is_refused() -> None:
    class Repeated(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = torch.relu(self.norm(self.layer(x)))
            return x

    for recorded in (1, 2, 3):
        model = normprop.convert(Repeated(recorded))
        for times in range(1, 6):
            model.times = times
            if times <= recorded:
                model(torch.randn(3, 4))
                continue
            with pytest.raises(NormPropError, match="was not recorded"):
                model(torch.randn(3, 4))
