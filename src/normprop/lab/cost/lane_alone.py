"""The moment lane of a converted network without the network, and one reading of its weights."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from normprop.conversion.lane import lane
from normprop.lab.cost.rounds import Step

_RENEWED = 16


class LaneAlone(nn.Module):
    """The moment lane of a converted network as a module without input; it returns effective weights and biases.

    Args:
        model: The result of `normprop.convert`, with which it shares its parameters.

    Example:
        >>> import normprop
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> weight, bias = LaneAlone(normprop.convert(net))()
        >>> weight.shape, bias.shape
        (torch.Size([8, 3, 3, 3]), torch.Size([8]))
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.lane = lane(model)
        self.entries = self.lane.entries[model.training]
        paths = dict.fromkeys(path for e in self.entries for path in (e.layer, e.site) if path is not None)
        self.parts = nn.ModuleList(model.get_submodule(path) for path in paths)

    def forward(self) -> tuple[Tensor, ...]:
        """The weight, factor and offset of every site, as far as it has them."""
        values = self.lane.evaluate(self.lane.root, self.entries).values()
        return tuple(t for value in values for t in value if t is not None)


def lane_step(lane: LaneAlone, *, compiled: bool = False) -> Step:
    """A step that runs the lane forward, and backward with a random gradient for each of its results."""
    run = torch.compile(lane, fullgraph=True, dynamic=False) if compiled else lane
    given = [torch.randn_like(t) for t in run() if t.requires_grad]
    cotangents = [t.clone() for t in given]
    steps = itertools.count()

    def step() -> None:
        # A weight's gradient is written into its cotangent; resetting that now and then costs nothing.
        if next(steps) % _RENEWED == 0:
            torch._foreach_copy_(cotangents, given)
        lane.zero_grad()
        results = [t for t in run() if t.requires_grad]
        torch.autograd.backward(results, cotangents)

    return step


def reading_step(lane: LaneAlone) -> Step:
    """A step that sums every parameter of the lane: the least that memory bandwidth lets any work on weights cost."""
    parameters = [p.detach() for p in lane.parameters()]
    return lambda: [p.sum() for p in parameters]
