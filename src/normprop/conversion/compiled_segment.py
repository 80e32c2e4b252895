"""Part of a moment lane as one compiled call forward and one back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.conversion.activation_setting import Setting, present_setting, traced_setting
from normprop.conversion.segment import Found, Parts, Segment
from normprop.conversion.segment_calls import apart, computed, gradients
from normprop.conversion.segment_frame import Frame, addresses
from normprop.conversion.segment_reading import Held, held_by, reading
from normprop.conversion.traced_segment import traced_segment
from normprop.double_backward import gradients_again
from normprop.native.operands import handles, handles_whole
from normprop.precision import full_precision, wide
from normprop.sites.reference import Scale
from normprop.sites.site import Site, site_tensors


def run_segment(
    segment: Segment,
    calls: Sequence[tuple[int, int | None, int]],
    weights: Sequence[Tensor],
    sites: Sequence[Site],
    modules: Sequence[nn.Module],
    given: Sequence[Moments],
    maps: Sequence[nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d],
) -> list[Any]:
    """A `Scale` for every scaling, then `Moments` for every export.

    Args:
        segment: what is computed.
        calls: of each scaling its site, weight and call. The segment knows them too; what stands in the program's own code
            is not looked at again whenever a traced graph runs.
        weights: of layers with a site.
        sites: the sites.
        modules: activations.
        given: moments from elsewhere.
        maps: linear layers without a site.
    """
    traced = torch.compiler.is_compiling()
    settings = tuple(map(traced_setting if traced else present_setting, modules))
    held = None if traced or given else held_by(weights, sites, maps, settings)
    known = None if held is None else segment.readings.get(sites[0])
    if held is not None and known is not None and known.is_of(held):
        flat: Sequence[Any] = _Compiled.apply(segment, known.found, known.frame, *known.tensors)
    else:
        flat = _read(segment, calls, weights, sites, settings, given, maps, held)
    count = 3 * len(calls)
    results: list[Any] = [Scale(*flat[i : i + 3]) for i in range(0, count, 3)]
    results += [Moments(*flat[i : i + 2]) for i in range(count, len(flat), 2)]
    return results


def _read(
    segment: Segment,
    calls: Sequence[tuple[int, int | None, int]],
    weights: Sequence[Tensor],
    sites: Sequence[Site],
    settings: tuple[Setting, ...],
    given: Sequence[Moments],
    maps: Sequence[nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d],
    held: Held | None,
) -> Sequence[Any]:
    """`run_segment` from all that modules hold, looked at anew."""
    weights = list(map(wide, weights))
    pairs: list[Any] = [None] * len(sites)
    centers: list[float] = []
    constants: list[Tensor | None] = []
    for at, index, call in calls:
        weight = None if index is None else weights[index]
        gamma, beta, shift, scale, directions = site_tensors(sites[at], call, weight)
        pairs[at] = gamma, beta
        constants += shift.contiguous(), scale.contiguous(), directions
        centers.append(0.0 if weight is None else sites[at].center)
    pairs = [pair or site_tensors(site, 0, None)[:2] for pair, site in zip(pairs, sites, strict=True)]
    parts = Parts(
        weights,
        [gamma.contiguous() for gamma, _ in pairs],
        [beta.contiguous() for _, beta in pairs],
        [wide(m.mean).contiguous() for m in given],
        [wide(m.var).contiguous() for m in given],
        [t if t is None else wide(t).contiguous() for m in maps for t in (m.weight, m.bias)],
    )
    tensors = [t for part in parts for t in part]
    every = (*tensors, *constants)
    like = parts.like
    if handles_whole(every, like.dtype):
        traced = traced_segment(segment, tuple(centers), settings, every)
        if traced is not None:
            return traced
    found = Found(segment.forms(tuple(centers)), tuple(constants), settings)
    if handles(every, like.dtype) and segment.fits(settings, parts):
        frame = Frame(segment, found, parts)
        kept = None if held is None else reading(held, found, parts, frame)
        if kept is not None:
            segment.readings[sites[0]] = kept
        flat: Sequence[Any] = _Compiled.apply(segment, found, frame, *tensors)
        return flat
    with full_precision(like):
        return segment.plain(found, parts, fast=True)


class _Compiled(torch.autograd.Function):
    """A segment in compiled arithmetic. Differentiated again, the backward is that of `Segment.plain`."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, found: Found, frame: Frame, *tensors: Any) -> tuple[Tensor | None, ...]:
        ctx.segment, ctx.forms, ctx.settings = segment, found.forms, found.settings
        ctx.frame = frame if frame.lasts else None
        ctx.set_materialize_grads(False)
        memory, columns, filters = computed(segment, frame, segment.parts(tensors))
        offsets = columns[1].split(segment.widths)
        outputs: list[Tensor | None] = []
        for multiplied, b, (first, last) in zip(filters, offsets, segment.spans, strict=True):
            outputs += multiplied, columns[0, first:last] if multiplied is None else None, b
        for place, shape in segment.exports:
            outputs += (memory[at : at + place.size].view(shape) for at in (place.mean, place.var))
        ctx.save_for_backward(*tensors, *found.constants, memory, columns)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        segment, frame = ctx.segment, ctx.frame
        *saved, memory, columns = ctx.saved_tensors
        constants = len(saved) - 3 * len(segment.scalings)
        tensors = saved[:constants]
        parts = segment.parts(tensors)
        found = Found(ctx.forms, tuple(saved[constants:]), ctx.settings)
        if torch.is_grad_enabled():
            return (None, None, None, *gradients_again(lambda t: segment.plain(found, segment.parts(t)), tensors, grads))
        if frame is None or frame.read != addresses(saved):  # `Tensor.data` was set
            frame = Frame(segment, found, parts)
        by_weights, rest = gradients(segment, frame, parts, (memory, columns), grads, ctx.needs_input_grad[3:])
        return (None, None, None, *by_weights, *apart(segment, parts, rest, grads))
