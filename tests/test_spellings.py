"""Unusual ways to write a forward: they have the moments of the usual way, and the converted network keeps its function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop import UnsupportedOpError
from tests.zoo import randomise

Part = Callable[[Any, Tensor], Tensor]


class Between(nn.Module):
    """A part of a network between two layers, given as a function."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.end = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 1.5, -1.0]).view(1, 4, 1, 1))
        self.register_buffer("order", torch.tensor([3, 1, 0, 2]))
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.last(self.part(self, self.norm(self.first(x)).relu())))


def without_nan(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[torch.isnan(x)] = 0
    return x


def capped(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[x > 1] = 1.0
    return x


def flattened_in_place(net: Any, x: Tensor) -> Tensor:
    y = x.clone().unsqueeze_(-1)
    z = y * net.scale.unsqueeze(-1)
    y.squeeze_(-1)
    return z.squeeze_(-1) + torch.cat([y, y], 1)[:, :4]


def freed(net: Any, x: Tensor) -> Tensor:
    y = x.clone()
    z = torch.cat([y, y], 1)[:, 4:]
    y.set_()  # its memory is gone; what was made of it stays
    return z


# An odd spelling, and a usual one of the same.
SPELLINGS: dict[str, tuple[Part, Part]] = {
    "expand_as": (lambda net, x: net.scale.expand_as(x) * x, lambda net, x: net.scale * x),
    "expand_as, then a function": (lambda net, x: net.scale.expand_as(x).relu() * x, lambda net, x: net.scale.relu() * x),
    "type_as": (lambda net, x: net.scale.type_as(x).relu() * x, lambda net, x: net.scale.relu() * x),
    "to": (lambda net, x: net.scale.to(x).relu() + x, lambda net, x: net.scale.relu() + x),
    "to a device": (lambda net, x: net.scale.to(x.device).relu() * x, lambda net, x: net.scale.relu() * x),
    "view_as": (lambda net, x: net.scale.repeat(len(x), 1, *x.shape[2:]).view_as(x) * x, lambda net, x: net.scale * x),
    "reshape_as": (lambda net, x: net.scale.repeat(len(x), 1, *x.shape[2:]).reshape_as(x) * x, lambda net, x: net.scale * x),
    "Variable": (
        lambda net, x: torch.index_select(x, 1, torch.autograd.Variable(net.order)),
        lambda net, x: torch.cat([x[:, 3:], x[:, 1:2], x[:, :1], x[:, 2:3]], 1),
    ),
    "an index": (lambda net, x: x[:, net.order], lambda net, x: x.index_select(1, net.order)),
    "isnan": (lambda net, x: torch.where(torch.isnan(x), torch.zeros_like(x), x), lambda net, x: x),
    "entries that are not numbers": (without_nan, lambda net, x: x),
    "entries above": (capped, lambda net, x: x.clamp(max=1.0)),
    "copy_": (lambda net, x: torch.empty_like(x).copy_(x), lambda net, x: x),
    "names of NumPy's": (lambda net, x: x - x.mean(axis=1, keepdims=True), lambda net, x: x - x.mean(1, keepdim=True)),
    "a maximum's": (lambda net, x: x + x.max(dim=1, keepdims=True)[0], lambda net, x: x + x.amax(1, keepdim=True)),
    "sizes in place": (flattened_in_place, lambda net, x: x * net.scale + torch.cat([x, x], 1)[:, :4]),
    "memory given back": (freed, lambda net, x: torch.cat([x, x], 1)[:, 4:]),
}


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_spellings(name: str) -> None:
    odd, usual = SPELLINGS[name]
    torch.manual_seed(0)
    network = randomise(Between(odd)).double().eval()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    network.part = usual
    expected, same = network(x), normprop.convert(network, example=x)
    network.part = odd
    converted = normprop.convert(network, example=x)
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(converted(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(copy.deepcopy(converted)(x[:1]), expected[:1], rtol=1e-9, atol=1e-9)
    for mine, theirs in ((converted.end.shift, same.end.shift), (converted.end.scale, same.end.scale)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)  # d and k say what moments were found


def test_arguments_that_a_rule_does_not_know_are_refused_by_name() -> None:
    network = Between(lambda _, x: x + torch.mean(x, 1, keepdim=True, out=None))
    with pytest.raises(UnsupportedOpError, match=r"torch\.mean.*does not know all of its arguments"):
        normprop.convert(network)


def test_attributes_are_constants_where_values_are_looked_at_too() -> None:
    class Looking(Between):
        def __init__(self) -> None:
            super().__init__(lambda net, x: x * net.window)
            self.window = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).view(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.mean()) < 1e6 else x * 0)

    network = randomise(Looking()).double().eval()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(normprop.convert(network, example=x)(x), network(x), rtol=1e-9, atol=1e-9)
