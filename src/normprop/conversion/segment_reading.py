"""What a compiled segment found in a network, for as long as all of it is there and lies where it did."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normprop.conversion.activation_setting import Setting
from normprop.conversion.segment import Found, Parts
from normprop.conversion.segment_frame import Frame
from normprop.sites.site import Site

_DTYPE = operator.attrgetter("dtype")


class Held(NamedTuple):
    """What modules hold that a segment reads; tensors as they are, before anything is made of them.

    Attributes:
        tensors: weights, all that the sites hold, weights and biases of maps.
        centers: of the sites, in steps.
        settings: of activations.
        threads: that torch computes with.
    """

    tensors: list[Tensor | None]
    centers: list[int]
    settings: tuple[Setting, ...]
    threads: int


class Reading(NamedTuple):
    """A run that read nothing but parameters as they are.

    Attributes:
        held: by the modules.
        read: the tensors that were read.
        laid: where and what they are.
        found: in the network.
        tensors: those that have gradients.
        frame: of all.
    """

    held: Held
    read: list[Tensor]
    laid: list[Any]
    found: Found
    tensors: list[Tensor | None]
    frame: Frame

    def is_of(self, held: Held) -> bool:
        """Whether modules hold the same still, in the same memory: `Tensor.data` may have been set."""
        known = self.held
        return (
            held[1:] == known[1:]
            and len(held.tensors) == len(known.tensors)
            and all(map(operator.is_, held.tensors, known.tensors))
            and _laid(self.read) == self.laid
        )


def held_by(
    weights: Sequence[Tensor], sites: Sequence[Site], maps: Sequence[nn.Module], settings: tuple[Setting, ...]
) -> Held | None:
    """What the modules of a segment hold; None where that is no sign of what it will read.

    Args:
        weights: of layers with a site.
        sites: the sites.
        maps: linear layers without a site.
        settings: of activations.
    """
    holders = [module._parameters for module in (*sites, *maps)]
    if not sites or "_is_replica" in sites[0].__dict__:
        return None
    tensors = [*weights, *(t for holder in holders for t in holder.values())]
    return Held(tensors, [site._center_steps for site in sites], settings, torch.get_num_threads())


def reading(held: Held, found: Found, parts: Parts, frame: Frame) -> Reading | None:
    """What to keep of a run; None where something was made of what modules hold.

    Args:
        held: by the modules.
        found: in the network.
        parts: tensors that have gradients.
        frame: of all.
    """
    tensors = [t for part in parts for t in part]
    read = [t for t in (*tensors, *found.constants) if t is not None]
    own = set(map(id, held.tensors))
    if not frame.lasts or not all(id(t) in own and t.is_leaf for t in read):
        return None
    return Reading(held, read, _laid(read), found, tensors, frame)


def _laid(tensors: Sequence[Tensor]) -> list[Any]:
    """Where in memory tensors are, what numbers they hold and how these lie."""
    sizes = list(map(Tensor.numel, tensors))
    return [*map(Tensor.data_ptr, tensors), *sizes, *map(_DTYPE, tensors), *(t.stride() for t in tensors if t.dim() > 1)]
