"""An exact rule is called so where its assumptions hold, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normprop
from normprop.inspection.assumptions import DEPENDENT, MIXED, REPEATED, UNEVEN


class Before(nn.Module):
    """Something, and a convolution behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.conv = function, nn.LazyConv2d(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.function(x))


HOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda x: torch.mul(*x.chunk(2, 1)),
    "slices": lambda x: x[:, :2] + x[:, 2:],
    "entries": lambda x: torch.stack([x[:, 0] * x[:, 1], x[:, 2] * x[:, 3]], 1),
    "pieces in another order": lambda x: torch.cat(x.split(1, dim=1)[::-1], 1),
    "a sum with itself": lambda x: x + x,
    "moved": lambda x: F.gelu(x.flip(1).roll(1, 2)),
    "one after the other": lambda x: torch.tanh(F.relu(x) - 0.5),
    "another order": lambda x: F.gelu(x[:, torch.tensor([2, 0, 1])]),
    "padded channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))[..., 1:3],
}
BROKEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "twice in a row": (lambda x: torch.cat([x, x], 1), REPEATED),
    "twice in another order": (lambda x: torch.cat([x, x.flip(1)], 1), REPEATED),
    "functions in a row": (lambda x: torch.stack([x, F.relu(x)], 1).flatten(1, 2), REPEATED),
    "repeated": (lambda x: x.repeat(1, 2, 1, 1), REPEATED),
    "enlarged": (lambda x: F.pixel_unshuffle(F.interpolate(x, scale_factor=2), 2), REPEATED),
    "mirrored sum": (lambda x: x + x.flip(1), DEPENDENT),
    "shifted product": (lambda x: x * x.roll(1, 2), DEPENDENT),
    "three of one": (lambda x: torch.addcmul(x, x, x.flip(1), value=0.2), DEPENDENT),
    "overlapping slices": (lambda x: x[:, :3] + x[:, 1:], DEPENDENT),
    "crop of a border": (lambda x: F.pad(x, (1, 1, 1, 1))[..., 1:-1, 1:-1], UNEVEN),
    "activation of a mixture": (lambda x: F.relu(F.pad(x, (2, 2, 2, 2))), MIXED),
    "activation of phases": (lambda x: torch.tanh(F.pixel_shuffle(x, 2)), MIXED),
    "activation of a product": (lambda x: F.relu(torch.mul(*x.chunk(2, 1))), MIXED),
    "an entry twice": (lambda x: x.index_select(1, torch.tensor([2, 0, 2])), REPEATED),
    "activation of a few activations": (lambda x: F.relu(F.conv2d(F.relu(x), torch.ones(2, 2, 1, 1), groups=2)), MIXED),
    "activations with a move between": (lambda x: F.silu(F.relu(x).flip(1)), MIXED),
}


def standings(function: Callable[[Tensor], Tensor]) -> list[tuple[str, str]]:
    network = Before(function)
    network(torch.randn(2, 4, 4, 4))
    report = normprop.propagate(network, example=torch.randn(2, 4, 4, 4))
    return [(row.standing, row.reason) for row in report if row.standing != "input"]


@pytest.mark.parametrize("name", HOLDS)
def test_what_holds(name: str) -> None:
    assert {standing for standing, _ in standings(HOLDS[name])} == {"exact"}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_hold(name: str) -> None:
    function, reason = BROKEN[name]
    assert ("approximate", reason) in standings(function)
