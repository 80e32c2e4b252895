"""Part of a moment lane as one compiled call forward and one back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normprop.activations.compiled_curves import native_curve
from normprop.channel_moments import Moments
from normprop.conversion.activation_setting import Setting, present_setting
from normprop.conversion.segment import Found, Parts, Segment
from normprop.conversion.segment_calls import apart, computed, gradients
from normprop.conversion.traced_segment import traced_segment
from normprop.double_backward import gradients_again
from normprop.native.operands import handles, handles_whole
from normprop.precision import full_precision, wide
from normprop.sites.reference import Scale
from normprop.sites.rows import Form
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
    every = (*tensors, *found.constants)
    if _fits(segment, found, parts):
        if handles_whole(every, like.dtype):
            return traced_segment(segment, found, tensors)
        if handles(every, like.dtype):
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
    return all(weights) and all(sites) and all(given) and all(maps) and all(map(_is_compiled, found.settings))


def _is_compiled(setting: Setting) -> bool:
    return isinstance(setting, float) or native_curve(*setting, True) is not None


# All that torch.compiler.assume_constant_result does; calling it would import the compiler, which takes a second.
_is_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function takes any attribute


class _Compiled(torch.autograd.Function):
    """A segment in compiled arithmetic. Differentiated again, the backward is that of `Segment.plain`."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, found: Found, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.segment, ctx.forms, ctx.settings = segment, found.forms, found.settings
        ctx.set_materialize_grads(False)
        memory, columns, filters = computed(segment, found, segment.parts(tensors))
        factors, offsets, *_ = (row.split(segment.widths) for row in columns.unbind())
        outputs: list[Tensor | None] = []
        for multiplied, f, b in zip(filters, factors, offsets, strict=True):
            outputs += multiplied, f if multiplied is None else None, b
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
        by_weights, rest = gradients(segment, found, parts, (memory, columns), grads, ctx.needs_input_grad[2:])
        return (None, None, *by_weights, *apart(segment, parts, rest, grads))
