"""Where the tensors of a compiled segment are in memory, as C reads them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from normprop.conversion.segment import Found, Parts, Segment
from normprop.conversion.segment_layout import LayoutKey, laid_out
from normprop.sites.c_engine import Layer
from normprop.sites.rows import Form, taps_first, to_rows


class Frame:
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
        lasts: whether it holds no copies, so that it is right for as long as the tensors lie where they do.
    """

    def __init__(self, segment: Segment, found: Found, parts: Parts) -> None:
        self.copies: dict[int, Layer] = {}
        self.weights, self.outside = parts.weights, [False] * segment.weights
        self.read = addresses(t for some in (*parts, found.constants) for t in some)
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
        self._turned: list[Tensor] = []
        for i, (s, directions) in enumerate(zip(segment.scalings, found.constants[2::3], strict=True)):
            if directions is not None and s.weight is not None:
                ranks[i] = len(directions)
                self.read[first + 3 * i + 2] = self._directions(s.weight, s.form, directions).data_ptr()
        exact = parts.like.dtype == torch.float64
        threads = torch.get_num_threads()
        key = LayoutKey(threads, found.forms, tuple(ranks), tuple(self.outside), found.settings, exact)
        self.layout = segment.layouts.get(key) or segment.layouts.setdefault(key, laid_out(segment, key))
        self.lasts = not (self.copies or self._turned)

    def _directions(self, index: int, form: Form, directions: Tensor) -> Tensor:
        """Directions that lie as a weight does."""
        if self.outside[index]:
            if taps_first(directions):
                return directions
        elif index not in self.copies and directions.is_contiguous():
            return directions
        directions = to_rows(directions, form, like=self.weights[index]).contiguous()
        self._turned.append(directions)
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


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """Where tensors are in memory, 0 for None."""
    return [0 if t is None else t.data_ptr() for t in tensors]
