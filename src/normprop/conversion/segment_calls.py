"""The two calls of a compiled segment: what it computes, and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normprop.conversion.segment import Found, Parts, Segment
from normprop.conversion.segment_layout import LayoutKey, laid_out
from normprop.native.library import library
from normprop.native.operands import is_unshared
from normprop.sites.c_engine import Layer
from normprop.sites.rows import Form, taps_first, to_rows


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


class _Frame:
    """Tensors of a segment as C reads them.

    Args:
        segment: the segment.
        found: in the network.
        parts: tensors that have gradients.

    Attributes:
        copies: weights whose filters don't lie one behind the other in memory, with copies for which they do.
        outside: which weights have the taps of a filter outside its inputs in memory.
        read: addresses of all tensors.
        layout: of the segment.
    """

    def __init__(self, segment: Segment, found: Found, parts: Parts) -> None:
        self.alive: list[Tensor] = []
        self.copies: dict[int, Layer] = {}
        self.weights, self.outside = parts.weights, [False] * segment.weights
        self.read = [0 if t is None else t.data_ptr() for some in (*parts, found.constants) for t in some]
        for i, (weight, reader) in enumerate(zip(parts.weights, segment.readers, strict=True)):
            form = found.forms[reader]
            if weight.is_contiguous() and not form.transposed:
                continue
            self.outside[i] = not form.transposed and taps_first(weight)
            if not self.outside[i]:
                self.copies[i] = Layer(weight, form)
                self.read[i] = self.copies[i].memory.data_ptr()
        ranks = [0] * len(segment.scalings)
        first = len(self.read) - len(found.constants)
        for i, (s, directions) in enumerate(zip(segment.scalings, found.constants[2::3], strict=True)):
            if directions is not None and s.weight is not None:
                ranks[i] = len(directions)
                self.read[first + 3 * i + 2] = self._directions(s.weight, s.form, directions).data_ptr()
        exact = parts.like.dtype == torch.float64
        threads = torch.get_num_threads()
        key = LayoutKey(threads, found.forms, tuple(ranks), tuple(self.outside), found.settings, exact)
        self.layout = segment.layouts.get(key) or segment.layouts.setdefault(key, laid_out(segment, key))

    def _directions(self, index: int, form: Form, directions: Tensor) -> Tensor:
        """Directions that lie as a weight does."""
        if self.outside[index]:
            if taps_first(directions):
                return directions
        elif index not in self.copies and directions.is_contiguous():
            return directions
        directions = to_rows(directions, form, like=self.weights[index]).contiguous()
        self.alive.append(directions)
        return directions

    def empty(self, index: int) -> Tensor:
        """Memory for another weight that lies as one does."""
        return self.copies[index].empty() if index in self.copies else torch.empty_like(self.weights[index])

    def turned(self, index: int) -> Tensor:
        """The same, contiguous."""
        weight = self.weights[index]
        return weight.new_empty(weight.shape)

    def laid(self, index: int, grad: Tensor) -> Tensor:
        """A gradient that lies as a weight does."""
        if index in self.copies:
            return self.copies[index].laid(grad)
        if taps_first(grad) if self.outside[index] else grad.is_contiguous():
            return grad
        return torch.empty_like(self.weights[index]).copy_(grad)

    def shaped(self, index: int, memory: Tensor) -> Tensor:
        """Such memory in the weight's shape."""
        return self.copies[index].shaped(memory) if index in self.copies else memory

    def address(self, tensor: Tensor | None) -> int:
        """Where the numbers of a tensor are, one behind the other; 0 for none."""
        if tensor is None:
            return 0
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self.alive.append(tensor)
        return tensor.data_ptr()


def computed(segment: Segment, found: Found, parts: Parts) -> Computed:
    """Moments and scales."""
    frame = _Frame(segment, found, parts)
    memory = parts.like.new_empty(segment.size)
    columns = memory.new_empty(5, frame.layout.channels)
    filters = [None if s.weight is None else frame.empty(s.weight) for s in segment.scalings]
    native = library()
    assert not isinstance(native, str)
    into = [0 if t is None else t.data_ptr() for t in filters]
    native.lane(memory.dtype, frame.layout, frame.read, into, memory.data_ptr(), columns.data_ptr())
    shaped = [
        None if s.weight is None or t is None else frame.shaped(s.weight, t)
        for s, t in zip(segment.scalings, filters, strict=True)
    ]
    return Computed(memory, columns, shaped)


def gradients(
    segment: Segment,
    found: Found,
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
        found: in the network.
        parts: tensors that have gradients.
        kept: memory and columns of `computed`.
        grads: of what it computes: filters, factor and offset of each scaling, then mean and variance of each export.
        needs: which weights need one.
        inside: which of these shall lie contiguous in memory, and no other in what the filters got. By default each lies as
            its weight does, and is written into what its filters got, where nobody else holds that.
    """
    memory, columns = kept
    frame = _Frame(segment, found, parts)
    count = 3 * len(segment.scalings)
    given: list[int] = []
    by_filters: list[Tensor | None] = []
    turned: list[bool] = []
    for s, by_multiplied, by_factor, by_offset in zip(segment.scalings, *(grads[i:count:3] for i in range(3)), strict=True):
        into, turns = None, False
        if s.weight is not None and (by_multiplied is not None or by_offset is not None):
            free = False
            if by_multiplied is not None:
                laid = frame.laid(s.weight, by_multiplied)
                free = laid is not by_multiplied or (inside is None and is_unshared(laid))
                by_multiplied = laid
                frame.alive.append(laid)
            if needs[s.weight]:
                turns = inside is not None and inside[s.weight] and frame.outside[s.weight]
                into = frame.turned(s.weight) if turns else by_multiplied if free else frame.empty(s.weight)
        turned.append(turns)
        given += (
            0 if by_multiplied is None else by_multiplied.data_ptr(),
            0 if by_factor is None else frame.address(by_factor),
            0 if by_offset is None else frame.address(by_offset),
        )
        by_filters.append(into)
    given += map(frame.address, grads[count:])
    sizes = parts.sizes
    ends = list(itertools.accumulate(sizes))
    rest = memory.new_zeros(ends[-1] if ends else 0)
    first, width = rest.data_ptr(), rest.element_size()
    results = [0] * segment.weights + [first + width * (end - n) if n else 0 for end, n in zip(ends, sizes, strict=True)]
    results += [0] * len(found.constants)
    native = library()
    assert not isinstance(native, str)
    native.lane_gradients(
        memory.dtype,
        frame.layout,
        frame.read,
        given,
        [0 if t is None else t.data_ptr() for t in by_filters],
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


def apart(segment: Segment, parts: Parts, rest: Tensor, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What `gradients` gave one behind the other, for each of the parts beside weights; None where nothing arrives."""
    return [
        None if t is None or not here else g if t.dim() == 1 else g.view(t.shape)
        for g, t, here in zip(rest.split(parts.sizes), parts.beside_weights, segment.asked(grads), strict=True)
    ]
