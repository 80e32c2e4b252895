"""Part of a moment lane as one compiled call forward and one back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normprop.activations.compiled_curves import native_curve
from normprop.channel_moments import Moments
from normprop.conversion.activation_setting import present_setting
from normprop.conversion.segment import Found, Parts, Segment
from normprop.conversion.segment_layout import LayoutKey, laid_out
from normprop.double_backward import gradients_again
from normprop.native.library import library
from normprop.native.operands import handles, is_unshared
from normprop.precision import full_precision, wide
from normprop.sites.c_engine import Layer
from normprop.sites.reference import Scale
from normprop.sites.rows import Form, to_rows
from normprop.sites.site import Site, site_tensors


def run_segment(
    segment: Segment,
    weights: Sequence[Tensor],
    sites: Sequence[Site],
    modules: Sequence[nn.Module],
    given: Sequence[Moments],
    maps: Sequence[nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d],
) -> list[Any]:
    """A `Scale` for every scaling, then `Moments` for every export."""
    weights = [wide(w) for w in weights]
    pairs: list[Any] = [None] * len(sites)
    forms: list[Form] = []
    constants: list[Tensor | None] = []
    for s in segment.scalings:
        site, form = sites[s.site], s.form
        if s.weight is not None and site.center is not form.center:
            form = Form(form.groups, form.transposed, form.stride, site.center)
        forms.append(form)
        weight = None if s.weight is None else weights[s.weight]
        gamma, beta, shift, scale, directions = site_tensors(site, s.call, weight)
        pairs[s.site] = gamma, beta
        constants += shift.contiguous(), scale.contiguous(), directions
    pairs = [pair or site_tensors(site, 0, None)[:2] for pair, site in zip(pairs, sites, strict=True)]
    found = Found(tuple(forms), tuple(constants), tuple(map(present_setting, modules)))
    parts = Parts(
        weights,
        [gamma.contiguous() for gamma, _ in pairs],
        [beta.contiguous() for _, beta in pairs],
        [wide(m.mean).contiguous() for m in given],
        [wide(m.var).contiguous() for m in given],
        [t if t is None else wide(t).contiguous() for m in maps for t in (m.weight, m.bias)],
    )
    flat = _run(segment, found, parts)
    count = 3 * len(segment.scalings)
    results: list[Any] = [Scale(*flat[i : i + 3]) for i in range(0, count, 3)]
    results += [Moments(*flat[i : i + 2]) for i in range(count, len(flat), 2)]
    return results


def _run(segment: Segment, found: Found, parts: Parts) -> Sequence[Any]:
    tensors = [t for part in parts for t in part]
    like = parts.like
    if _fits(segment, found, parts) and handles((*tensors, *found.constants), like.dtype):
        flat: Sequence[Any] = _Compiled.apply(segment, found, *tensors)
        return flat
    with full_precision(like):
        return segment.plain(found, parts, fast=True)


def _fits(segment: Segment, found: Found, parts: Parts) -> bool:
    """Whether tensors have the sizes for which the segment was laid out, and activations are compiled ones."""
    weights = (s.weight is None or parts.weights[s.weight].shape == s.shape for s in segment.scalings)
    sites = (g.numel() == b.numel() == n for g, b, n in zip(parts.gammas, parts.betas, segment.channels, strict=True))
    given = (
        (m.numel(), v.numel()) == sizes for m, v, sizes in zip(parts.means, parts.variances, segment.given, strict=True)
    )
    maps = (
        weight is not None and weight.shape == m.shape and (bias is not None) is m.offset
        for m, weight, bias in zip(segment.maps, parts.maps[::2], parts.maps[1::2], strict=True)
    )
    curves = (isinstance(setting, float) or native_curve(*setting, True) is not None for setting in found.settings)
    return all(weights) and all(sites) and all(given) and all(maps) and all(curves)


class _Frame:
    """Tensors of a segment as C reads them.

    Args:
        segment: the segment.
        found: in the network.
        parts: tensors that have gradients.

    Attributes:
        rows: weights as filters one behind the other in memory, of those that don't lie so themselves.
        read: addresses of all tensors.
        layout: of the segment.
    """

    def __init__(self, segment: Segment, found: Found, parts: Parts) -> None:
        self.alive: list[Tensor] = []
        self.rows: dict[int, Layer] = {}
        self.read: list[int] = []
        for i, (weight, reader) in enumerate(zip(parts.weights, segment.readers, strict=True)):
            if found.forms[reader].transposed or not weight.is_contiguous():
                self.rows[i] = Layer(weight, found.forms[reader])
                weight = self.rows[i].memory
            self.read.append(weight.data_ptr())
        self.read += [0 if t is None else t.data_ptr() for some in parts[1:] for t in some]
        ranks = []
        for i, s in enumerate(segment.scalings):
            shift, scale, directions = found.constants[3 * i : 3 * i + 3]
            assert shift is not None
            assert scale is not None
            rank, address = 0, 0
            if directions is not None and s.weight is not None:
                rank = len(directions)
                if s.weight in self.rows or not directions.is_contiguous():
                    directions = to_rows(directions, found.forms[i], like=parts.weights[s.weight]).contiguous()
                    self.alive.append(directions)
                address = directions.data_ptr()
            ranks.append(rank)
            self.read += shift.data_ptr(), scale.data_ptr(), address
        outside = tuple(i in self.rows and self.rows[i].outside for i in range(len(parts.weights))) if self.rows else ()
        exact = parts.like.dtype == torch.float64
        key = LayoutKey(torch.get_num_threads(), found.forms, tuple(ranks), outside, found.settings, exact)
        self.layout = segment.layouts.get(key) or segment.layouts.setdefault(key, laid_out(segment, key))

    def empty(self, index: int, weight: Tensor) -> Tensor:
        """Memory for another weight that lies as one does."""
        return self.rows[index].empty() if index in self.rows else torch.empty_like(weight)

    def laid(self, index: int, grad: Tensor) -> Tensor:
        """A gradient that lies as a weight does."""
        if index in self.rows:
            return self.rows[index].laid(grad)
        return grad if grad.is_contiguous() else grad.contiguous()

    def shaped(self, index: int, memory: Tensor) -> Tensor:
        """Such memory in the weight's shape."""
        return self.rows[index].shaped(memory) if index in self.rows else memory

    def address(self, tensor: Tensor | None) -> int:
        """Where the numbers of a tensor are, one behind the other; 0 for none."""
        if tensor is None:
            return 0
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self.alive.append(tensor)
        return tensor.data_ptr()


class _Compiled(torch.autograd.Function):
    """A segment in compiled arithmetic. Differentiated again, the backward is that of `Segment.plain`."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, found: Found, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.segment, ctx.forms, ctx.settings = segment, found.forms, found.settings
        ctx.set_materialize_grads(False)
        parts = segment.parts(tensors)
        frame = _Frame(segment, found, parts)
        layout = frame.layout
        memory = parts.like.new_empty(segment.size)
        columns = memory.new_empty(5, layout.channels)
        filters = [None if s.weight is None else frame.empty(s.weight, parts.weights[s.weight]) for s in segment.scalings]
        native = library()
        assert not isinstance(native, str)
        into = [0 if t is None else t.data_ptr() for t in filters]
        native.lane(memory.dtype, layout, frame.read, into, memory.data_ptr(), columns.data_ptr())
        factors, offsets, *_ = (row.split(segment.widths) for row in columns.unbind())
        outputs: list[Tensor | None] = []
        for s, multiplied, f, b in zip(segment.scalings, filters, factors, offsets, strict=True):
            if s.weight is None or multiplied is None:
                outputs += None, f, b
            else:
                outputs += frame.shaped(s.weight, multiplied), None, b
        for place, shape in segment.exports:
            outputs += (memory[at : at + place.size].view(shape) for at in (place.mean, place.var))
        ctx.save_for_backward(*tensors, *found.constants, memory, columns)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        segment = ctx.segment
        *saved, memory, columns = ctx.saved_tensors
        constants = len(saved) - 3 * len(segment.scalings)
        tensors = saved[:constants]
        found, parts = Found(ctx.forms, tuple(saved[constants:]), ctx.settings), segment.parts(tensors)
        if torch.is_grad_enabled():
            return (None, None, *gradients_again(lambda t: segment.plain(found, segment.parts(t)), tensors, grads))
        needs = ctx.needs_input_grad[2:]
        return (None, None, *_gradients(segment, found, parts, memory, columns, grads, needs))


def _gradients(
    segment: Segment,
    found: Found,
    parts: Parts,
    memory: Tensor,
    columns: Tensor,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of weights, γ, β, and of given means and variances.

    That of a weight is written into what its filters got, where nobody else holds that.
    """
    frame = _Frame(segment, found, parts)
    given: list[int] = []
    by_filters: list[Tensor | None] = []
    for i, s in enumerate(segment.scalings):
        by_multiplied, *others = grads[3 * i : 3 * i + 3]
        into = None
        if s.weight is not None and (by_multiplied is not None or others[1] is not None):
            free = False
            if by_multiplied is not None:
                laid = frame.laid(s.weight, by_multiplied)
                free = laid is not by_multiplied or is_unshared(laid)
                by_multiplied = laid
                frame.alive.append(laid)
            if needs[s.weight]:
                into = by_multiplied if free else frame.empty(s.weight, parts.weights[s.weight])
        given.append(0 if by_multiplied is None else by_multiplied.data_ptr())
        given += map(frame.address, others)
        by_filters.append(into)
    given += map(frame.address, grads[3 * len(segment.scalings) :])
    sizes = [0 if t is None else t.numel() for some in parts[1:] for t in some]
    rest = memory.new_zeros(sum(sizes)).split(sizes)
    results = [0] * segment.weights + [t.data_ptr() if n else 0 for t, n in zip(rest, sizes, strict=True)]
    results += [0] * len(found.constants)
    native = library()
    assert not isinstance(native, str)
    native.lane_gradients(
        memory.dtype,
        frame.layout,
        frame.read,
        given,
        [0 if t is None else t.data_ptr() for t in by_filters],
        results,
        (memory.data_ptr(), segment.size),
        columns.data_ptr(),
    )
    by_weights: list[Tensor | None] = [None] * segment.weights
    for s, one in zip(segment.scalings, by_filters, strict=True):
        if s.weight is not None and one is not None:
            shaped, other = frame.shaped(s.weight, one), by_weights[s.weight]
            by_weights[s.weight] = shaped if other is None else other + shaped
    others = [t for some in parts[1:] for t in some]
    return [
        *by_weights,
        *(
            g.view(t.shape) if here and t is not None else None
            for g, t, here in zip(rest, others, segment.asked(grads), strict=True)
        ),
    ]
