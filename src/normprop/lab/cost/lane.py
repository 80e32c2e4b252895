"""The moment lane of a converted network alone, forward and backward, and one reading of what it reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from normprop.conversion.lane import lane_graph
from normprop.lab.cost.rounds import Step

_RENEWED = 16


class Lane(nn.Module):
    """The moment lane cut out of a converted network: no input; what the data lane reads of it as a tuple of tensors.

    Args:
        model: what `normprop.convert` returned; parameters are shared with it.

    Example:
        >>> import normprop
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> filters, offset = Lane(normprop.convert(net))()
        >>> filters.shape, offset.shape
        (torch.Size([8, 3, 3, 3]), torch.Size([8]))
    """

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = fx.GraphModule(model, lane_graph(model.graph), "Lane")

    def forward(self) -> tuple[Tensor, ...]:
        """Filters, factors, offsets and averages of every site, as far as it has them."""
        return tuple(t for value in self.graph_module() for t in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for entry in value:
            yield from _tensors(entry)


def lane_step(lane: Lane, *, compiled: bool = False) -> Step:
    """Forward of the lane, and backward with a random gradient for each of its results."""
    run = torch.compile(lane, fullgraph=True, dynamic=False) if compiled else lane
    given = [torch.randn_like(t) for t in run() if t.requires_grad]
    cotangents = [t.clone() for t in given]
    steps = itertools.count()

    def step() -> None:
        # A weight's gradient is written into its cotangent: seldom enough to cost nothing, that is what it was again.
        if next(steps) % _RENEWED == 0:
            torch._foreach_copy_(cotangents, given)
        lane.zero_grad()
        results = [t for t in run() if t.requires_grad]
        torch.autograd.backward(results, cotangents)

    return step


def reading_step(lane: Lane) -> Step:
    """One reading of every parameter of the lane, as a sum: what memory bandwidth alone asks of any work on weights."""
    parameters = [p.detach() for p in lane.parameters()]
    return lambda: [p.sum() for p in parameters]
