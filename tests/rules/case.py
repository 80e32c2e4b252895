"""What a case of a rule test is, and how it is evaluated: by the rule, and by sampling the operation itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normprop import Moments
from normprop.graph.node import Node, map_nodes
from normprop.graph.preparation import prepare
from normprop.graph.walk import Walk

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Case:
    """One operation.

    Attributes:
        operation: called with the inputs; a module or a function.
        shapes: sample shape of each input, channels first.
        exact: compare with z < 5 instead of a tolerance.
        tolerance: of the mean in standard deviations (or in root mean squares, if smaller), and of the standard deviation.
        correlation: between the positions of a channel.
        channel: channel dimension of the inputs, with the batch.
        positive: the input is far above zero.
        samples: how many.
        moments: mean and variance of every input; random ones by default.
        train: run in training mode.
    """

    operation: Callable[..., Any]
    shapes: Sequence[Shape]
    exact: bool = True
    tolerance: float = 0.0
    correlation: float = 0.0
    channel: int = 1
    positive: bool = False
    samples: int = 20000
    moments: Moments | None = None
    train: bool = False

    def given(self) -> list[Moments]:
        """Moments of each input: vectors over its channels."""
        sizes = [shape[self.channel - (self.channel > 0)] for shape in self.shapes]
        return [self.moments or channel_moments(size, self.positive, i) for i, size in enumerate(sizes)]

    def inputs(self) -> list[Moments]:
        """`given`, with the rank of the inputs."""
        return [m.aligned(len(s) + 1, self.channel) for m, s in zip(self.given(), self.shapes, strict=True)]

    def sample(self, samples: int) -> list[Tensor]:
        """Gaussian inputs, independent or equally correlated over the positions of a channel."""
        generator = torch.Generator().manual_seed(7)
        draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
        found = []
        for moments, shape in zip(self.inputs(), self.shapes, strict=True):
            z = draw(samples, *shape)
            if self.correlation:
                shared = [samples, *(s if d + 1 == self.channel % z.dim() else 1 for d, s in enumerate(shape))]
                z = self.correlation**0.5 * draw(*shared) + (1 - self.correlation) ** 0.5 * z
            found.append(moments.mean + moments.std * z)
        return found

    def walk(self) -> Walk:
        """The operation, recorded."""
        return prepare(self.network(), shape=tuple(self.shapes))

    def network(self) -> nn.Module:
        """A module around the operation."""
        return _NETWORKS[len(self.shapes)](self.operation).double().train(self.train)


class One(nn.Module):
    """A network of one operation; a buffer tells its precision."""

    def __init__(self, operation: Callable[..., Any]) -> None:
        super().__init__()
        self.operation = operation
        self.register_buffer("precision", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        return self.operation(x)


class Two(One):
    def forward(self, x: Any, y: Any) -> Any:
        return self.operation(x, y)


class Three(One):
    def forward(self, x: Any, y: Any, z: Any) -> Any:
        return self.operation(x, y, z)


_NETWORKS = {1: One, 2: Two, 3: Three}


def channel_moments(channels: int, positive: bool = False, seed: int = 0) -> Moments:
    """Random mean and variance of each channel."""
    generator = torch.Generator().manual_seed(channels + 100 * seed)
    mean = torch.randn(channels, generator=generator, dtype=torch.float64) * 0.6
    var = 0.3 + 0.9 * torch.rand(channels, generator=generator, dtype=torch.float64)
    return Moments(4.0 + mean, 0.02 * var) if positive else Moments(mean, var)


def evaluate(walk: Walk, inputs: Sequence[Moments]) -> Any:
    """What the rules say of the output."""
    walk.require()
    moments: dict[Node, Any] = {}
    given = iter(inputs)
    for node in walk.nodes:
        if node.op == "input":
            moments[node] = next(given)
        elif node.data and node in walk.rules:
            module = walk.module(node) if node.op == "module" else None
            function, args, kwargs = walk.call(node, moments.__getitem__, walk.known, module)
            moments[node] = function(*args, **kwargs)
    return map_nodes(walk.record.output, moments.__getitem__)


def flat(result: Any) -> list[Any]:
    """The entries of nested outputs that have moments, or are tensors."""
    if isinstance(result, Moments | Tensor):
        return [result]
    return [] if result is None else [entry for part in result for entry in flat(part)]


def measured(y: Tensor, predicted: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and mean square deviation from the predicted mean, both with their standard error, where they vary."""
    shape = torch.broadcast_shapes(predicted.mean.shape, predicted.var.shape)
    y = y.double()
    over = [d for d in range(1, y.dim()) if shape[d] == 1]
    pool = lambda t: t.mean(over, keepdim=True) if over else t
    first, second = pool(y), pool((y - predicted.mean.detach()).square())
    error = lambda t: t.std(0, keepdim=True) / len(t) ** 0.5
    return first.mean(0, keepdim=True), error(first), second.mean(0, keepdim=True), error(second)
