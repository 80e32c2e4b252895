"""The compiled arithmetic as an operation that `torch.compile` takes as it is, instead of looking inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from normprop.sites.c_engine import Call
from normprop.sites.reference import Scale
from normprop.sites.rows import CENTER_STEPS, Form, Operands, sites_of

_CODES = 4  # of a form
# However operands lie, they are taken; otherwise the compiler would copy weights to be sure of it.
_TAGS = (torch.Tag.flexible_layout,)


def whole_scales(forms: Sequence[Form], operands: Sequence[Operands]) -> list[Scale]:
    """What `normprop.sites.engine.scales` gives where a graph is traced."""
    codes = [int(code) for form in forms for code in (form.groups, form.transposed, form.stride, form.center_steps)]
    given = [t is not None for one in operands for t in one]
    columns, *filters = _scales(codes, given, [t for one in operands for t in one if t is not None])
    sizes = [one.gamma.shape[0] for one in operands]
    rest = iter(filters)
    return [
        Scale(None, factor, offset) if one.weight is None else Scale(next(rest), None, offset)
        for one, factor, offset in zip(operands, columns[0].split(sizes), columns[1].split(sizes), strict=True)
    ]


@torch.library.custom_op("normprop::scales", mutates_args=(), device_types="cpu", tags=_TAGS)
def _scales(codes: list[int], given: list[bool], tensors: list[Tensor]) -> list[Tensor]:
    columns, filters = _call(codes, given, tensors).scales()
    return [columns, *(t for t in filters if t is not None)]


@_scales.register_fake
def _(codes: list[int], given: list[bool], tensors: list[Tensor]) -> list[Tensor]:
    call = _call(codes, given, tensors)
    return [call.sites[0].gamma.new_empty(5, sum(call.sizes)), *_like_weights(call)]


@torch.library.custom_op("normprop::scales_backward", mutates_args=(), device_types="cpu", tags=_TAGS)
def _scales_backward(
    codes: list[int], given: list[bool], tensors: list[Tensor], columns: Tensor, grads: list[Tensor]
) -> list[Tensor]:
    call = _call(codes, given, tensors)
    rest = iter(grads[1:])
    by_factor, by_offset = (row.split(call.sizes) for row in grads[0][:2].unbind())
    each: list[Tensor | None] = []
    for layer, f, b in zip(call.layers, by_factor, by_offset, strict=True):
        each += (None, f, b) if layer is None else (next(rest), None, b)
    weights, by_moments, by_constants = call.gradients(columns, each, [True] * len(call.sites), in_place=False)
    return [by_moments.clone(), by_constants, *(t for t in weights if t is not None)]


@_scales_backward.register_fake
def _(codes: list[int], given: list[bool], tensors: list[Tensor], columns: Tensor, grads: list[Tensor]) -> list[Tensor]:
    call = _call(codes, given, tensors)
    numbers = sum(t.numel() for site in call.sites for t in site[1:3] if t is not None)
    return [columns.new_empty(numbers), columns.new_empty(2, columns.shape[1]), *_like_weights(call)]


def _keep_scales(ctx: Any, inputs: tuple[list[int], list[bool], list[Tensor]], output: list[Tensor]) -> None:
    ctx.codes, ctx.given, tensors = inputs
    ctx.save_for_backward(*tensors, output[0])


def _differentiate_scales(ctx: Any, grads: list[Tensor | None]) -> tuple[None, None, list[Tensor | None]]:
    *tensors, columns = ctx.saved_tensors
    call = _call(ctx.codes, ctx.given, tensors)
    likes = [columns, *(layer.weight for layer in call.layers if layer is not None)]
    filled = [torch.zeros_like(like) if g is None else g for g, like in zip(grads, likes, strict=True)]
    by_moments, by_constants, *weights = _scales_backward(ctx.codes, ctx.given, tensors, columns, filled)
    rest = iter(weights)
    found = call.apart([None if layer is None else next(rest) for layer in call.layers], by_moments, by_constants)
    return None, None, [g for g, known in zip(found, ctx.given, strict=True) if known]


_scales.register_autograd(_differentiate_scales, setup_context=_keep_scales)


def _call(codes: Sequence[int], given: Sequence[bool], tensors: Sequence[Tensor]) -> Call:
    rest = iter(tensors)
    each: list[Any] = [next(rest) if known else None for known in given]
    return Call(list(_forms(codes)), sites_of(each))


def _forms(codes: Sequence[int]) -> Iterator[Form]:
    for i in range(0, len(codes), _CODES):
        groups, transposed, stride, center = codes[i : i + _CODES]
        yield Form(groups, bool(transposed), stride, center / CENTER_STEPS)


def _like_weights(call: Call) -> list[Tensor]:
    """Tensors such as filters or their gradients will be."""
    return [
        torch.empty_like(layer.weight) if layer.itself else layer.weight.new_empty(layer.weight.shape)
        for layer in call.layers
        if layer is not None
    ]
