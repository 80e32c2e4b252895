"""The two calls of a compiled segment: what it computes, and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from normprop.conversion.segment import Parts, Segment
from normprop.conversion.segment_frame import Frame, addresses
from normprop.native.library import library
from normprop.native.operands import is_unshared


class Computed(NamedTuple):
    """What a segment computes.

    Attributes:
        memory: of all moments.
        columns: five numbers a channel, of all scalings one behind the other: f, b, the filter's mean, E and V.
        filters: the effective weight of each scaling, in its weight's shape; None without a layer.
    """

    memory: Tensor
    columns: Tensor
    filters: list[Tensor | None]


def computed(segment: Segment, frame: Frame, parts: Parts) -> Computed:
    """Moments and scales.

    Args:
        segment: the segment.
        frame: of the tensors.
        parts: those that have gradients.
    """
    memory = parts.like.new_empty(segment.size)
    columns = memory.new_empty(5, frame.layout.channels)
    filters = [None if s.weight is None else frame.empty(s.weight) for s in segment.scalings]
    native = library()
    assert not isinstance(native, str)
    native.lane(memory.dtype, frame.layout, frame.read, addresses(filters), memory.data_ptr(), columns.data_ptr())
    if frame.copies:
        filters = [
            None if s.weight is None or t is None else frame.shaped(s.weight, t)
            for s, t in zip(segment.scalings, filters, strict=True)
        ]
    return Computed(memory, columns, filters)


def gradients(
    segment: Segment,
    frame: Frame,
    parts: Parts,
    kept: tuple[Tensor, Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    *,
    inside: Sequence[bool] | None = None,
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of weights, and those of all else that has some, one behind the other.

    Args:
        segment: the segment.
        frame: of the tensors.
        parts: those that have gradients.
        kept: memory and columns of `computed`.
        grads: of what it computes: filters, factor and offset of each scaling, then mean and variance of each export.
        needs: which weights need one.
        inside: which of these shall lie contiguous in memory, and no other in what the filters got. By default each lies as
            its weight does, and is written into what its filters got, where nobody else holds that.
    """
    memory, columns = kept
    count = 3 * len(segment.scalings)
    read = list(grads)
    by_filters: list[Tensor | None] = []
    turned: list[bool] = []
    for i, s in zip(range(0, count, 3), segment.scalings, strict=True):
        into, turns = None, False
        by_multiplied = grads[i]
        if s.weight is not None and (by_multiplied is not None or grads[i + 2] is not None):
            free = False
            if by_multiplied is not None:
                laid = read[i] = frame.laid(s.weight, by_multiplied)
                free = laid is not by_multiplied or (inside is None and is_unshared(laid))
            if needs[s.weight]:
                turns = inside is not None and inside[s.weight] and frame.outside[s.weight]
                into = frame.turned(s.weight) if turns else read[i] if free else frame.empty(s.weight)
        read[i + 1], read[i + 2] = _packed(read[i + 1]), _packed(read[i + 2])
        turned.append(turns)
        by_filters.append(into)
    read[count:] = map(_packed, read[count:])
    sizes = parts.sizes
    ends = list(itertools.accumulate(sizes))
    rest = memory.new_zeros(ends[-1] if ends else 0)
    first, width = rest.data_ptr(), rest.element_size()
    results = [0] * segment.weights + [first + width * (end - n) if n else 0 for end, n in zip(ends, sizes, strict=True)]
    results += [0] * (len(frame.read) - len(results))
    native = library()
    assert not isinstance(native, str)
    native.lane_gradients(
        memory.dtype,
        frame.layout,
        frame.read,
        addresses(read),
        addresses(by_filters),
        turned,
        results,
        (memory.data_ptr(), segment.size),
        columns.data_ptr(),
    )
    by_weights: list[Tensor | None] = [None] * segment.weights
    for s, one in zip(segment.scalings, by_filters, strict=True):
        if s.weight is not None and one is not None:
            shaped, other = frame.shaped(s.weight, one), by_weights[s.weight]
            by_weights[s.weight] = shaped if other is None else other + shaped
    return by_weights, rest


def _packed(tensor: Tensor | None) -> Tensor | None:
    """The tensor with its numbers one behind the other."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def apart(segment: Segment, parts: Parts, rest: Tensor, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What `gradients` gave one behind the other, for each of the parts beside weights; None where nothing arrives."""
    return [
        None if t is None or not here else g if t.dim() == 1 else g.view(t.shape)
        for g, t, here in zip(rest.split(parts.sizes), parts.beside_weights, segment.asked(grads), strict=True)
    ]
