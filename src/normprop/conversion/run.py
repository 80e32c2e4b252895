"""What one thread is doing in a converted network: between the hooks of a layer, and those of the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normprop.conversion.entry import Entry, Key
from normprop.conversion.placement import Placement
from normprop.sites.reference import Scale


class Handed(NamedTuple):
    """What a layer gave to its site.

    Attributes:
        entry: of that call.
        output: of the layer.
        rest: factor and offset if the layer ran with bare filters, so that they are still to come.
        version: of the output when it was given; None where torch doesn't count.
    """

    entry: Entry
    output: Tensor
    rest: tuple[Tensor, Tensor] | None
    version: int | None

    def is_intact(self, x: Tensor) -> bool:
        """Whether a tensor is the output as it was given, or holds the same numbers in the same memory."""
        output = self.output
        if self.version is not None and output._version != self.version:
            return False
        return x is output or _same_memory(x, output)


@dataclass(eq=False)
class Run:
    """What one thread is doing in a converted network.

    Attributes:
        root: the network whose forward runs; None outside of it.
        values: scales by entry, as far as they are known.
        calls: how often every layer and site has run.
        ready: entry, weight, bias and site of layers that run once in a forward, with nothing in between, until they run.
        handed: for each site, what layers before it gave.
        placements: of the networks' entries, by mode; kept from one forward to the next.
        open: layers that run now: the hook that covers each, its entry, what is still to be applied after it, and what the
            layer's own attributes were.
    """

    root: nn.Module | None = None
    values: dict[Key, Scale] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    ready: dict[str, tuple[Entry, Tensor, Tensor, nn.Module | None]] = field(default_factory=dict)
    handed: dict[str, list[Handed]] = field(default_factory=dict)
    placements: dict[bool, Placement] = field(default_factory=dict)
    open: list[tuple[Any, Entry | None, Any, Any, Any]] = field(default_factory=list)


def _same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory, as a tensor and what `Tensor.view_as` makes of it."""
    if torch.compiler.is_compiling() or x.shape != y.shape or x.stride() != y.stride() or x.dtype != y.dtype:
        return False
    try:
        return x.data_ptr() == y.data_ptr()
    except RuntimeError:  # within the transforms of torch.func a tensor has no address
        return False
