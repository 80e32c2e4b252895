"""Mean and variance of what every site standardises, from one pass through a network as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normprop.conversion.entry import Entry, Key
from normprop.conversion.lane import Lane
from normprop.conversion.measuring_mode import measuring, take_paths_of_training
from normprop.conversion.program_calls import raw
from normprop.errors import NormPropError, NotFiniteError
from normprop.graph.example_inputs import Inputs
from normprop.precision import wide

Statistics = tuple[Tensor, Tensor]


@torch.no_grad()
def output_statistics(
    model: nn.Module, lane: Lane, batches: Sequence[Inputs]
) -> tuple[Mapping[Key, Statistics], Mapping[Key, Statistics]]:
    """Mean and variance per channel of every layer's output without its bias, and of what other sites standardise.

    The network computes what it computes, so that each sample takes one pass. `calibrate` can't do with that: it changes
    what later layers see.

    Args:
        model: a converted network, which is left as it is.
        lane: its lane.
        batches: one after the other.

    Returns:
        Statistics by site and call, ``(C,)`` each; and factor and offset of each site's call.

    Raises:
        NormPropError: one value per channel, which has no variance.
        NotFiniteError: values in the network are not finite.
    """
    measured = _Outputs(model, lane)
    with measuring(model):
        lane.observer = measured
        try:
            if {e.key for e in lane.entries[True]} > {e.key for e in lane.entries[False]}:
                take_paths_of_training(model)
            for batch in batches:
                model(*batch.args, **batch.kwargs)
        finally:
            lane.observer = None
    return {key: _statistics(*sums) for key, sums in measured.sums.items()}, measured.functions


class _Outputs:
    """Adds up what layers give while a lane has this for its observer.

    Args:
        model: the network.
        lane: the lane.
    """

    def __init__(self, model: nn.Module, lane: Lane) -> None:
        self.model, self.lane = model, lane
        self.sums: dict[Key, tuple[int, Tensor, Tensor]] = {}
        self.functions: dict[Key, Statistics] = {}

    def at_layer(self, entry: Entry, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Nothing yet."""

    def at_output(self, entry: Entry, layer: nn.Module, output: Tensor, rest: tuple[Tensor, Tensor]) -> None:
        """A layer has run with bare filters and its own bias; factor and offset are still to come."""
        bias = raw(layer, "bias")
        self._add(entry, output, entry.options["channel"], bias)
        if entry.key not in self.functions:
            factor, offset = rest
            self.functions[entry.key] = factor, offset if bias is None else offset + factor * bias

    def at_site(self, entry: Entry, x: Tensor) -> None:
        """A site without a layer is about to scale its input."""
        self._add(entry, x, 1, None)
        if entry.key not in self.functions:
            self.functions[entry.key] = self.lane.function(self.model, entry)

    def _add(self, entry: Entry, x: Tensor, channel: int, bias: Tensor | None) -> None:
        others = [d for d in range(x.dim()) if d != channel % x.dim()]
        count = x.numel() // x.shape[channel]
        x = wide(x)
        mean = x.mean(others, keepdim=True)
        square = (x - mean).square_().sum(others)
        mean = mean.flatten()
        if bias is not None:
            mean = mean - bias.to(mean)
        before = self.sums.get(entry.key)
        if before is not None:  # Chan, Golub and LeVeque (1979)
            n, other, more = before
            gap = mean - other
            square = square + more + gap.square() * (n * count / (n + count))
            mean, count = other + gap * (count / (n + count)), n + count
        self.sums[entry.key] = count, mean, square


def _statistics(count: int, mean: Tensor, square: Tensor) -> Statistics:
    if count < 2:
        raise NormPropError("one value per channel has no variance to measure.\nPass more samples.")
    if not bool(torch.isfinite(square).all()):
        raise NotFiniteError("values after a layer are not finite.")
    return mean, square / count
