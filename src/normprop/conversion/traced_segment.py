"""A compiled segment as an operation that `torch.compile` takes as it is, instead of looking inside."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normprop.conversion.activation_setting import Setting
from normprop.conversion.segment import Found, Parts, Segment
from normprop.conversion.segment_calls import apart, computed, gradients
from normprop.conversion.segment_frame import Frame
from normprop.double_backward import gradients_again
from normprop.sites.c_engine import Layer
from normprop.sites.rows import Form
from normprop.traced_constant import traced_constant

# However operands lie, they are taken; otherwise the compiler would copy weights to be sure of it.
_TAGS = (torch.Tag.flexible_layout,)


class Traced(NamedTuple):
    """What a graph holds of a segment beside tensors.

    Attributes:
        segment: the segment.
        forms: of each scaling.
        settings: of the modules.
        given: which of the tensors there are, those with gradients and then d, k and U of each scaling.
    """

    segment: Segment
    forms: tuple[Form, ...]
    settings: tuple[Setting, ...]
    given: tuple[bool, ...]

    def placed(self, tensors: Sequence[Tensor]) -> tuple[Found, list[Tensor | None]]:
        """What was found and what has gradients, from the tensors that there are."""
        rest = iter(tensors)
        every = [next(rest) if known else None for known in self.given]
        constants = len(every) - 3 * len(self.segment.scalings)
        return Found(self.forms, tuple(every[constants:]), self.settings), every[:constants]

    def likes(self, parts: Parts) -> list[Tensor]:
        """Tensors such as weights' filters or gradients will be, on the device of shapes alone."""
        return [
            _like(weight, self.forms[reader]) for weight, reader in zip(parts.weights, self.segment.readers, strict=True)
        ]


# Compiled graphs are kept in files: those of another version of the operations are not for these.
_SOURCE = Path(__file__).read_bytes()
# By what is in them: graphs name them, which may be kept in files and outlive the network.
_TRACED: dict[str, Traced] = {}


def traced_segment(
    segment: Segment, centers: tuple[float, ...], settings: tuple[Setting, ...], tensors: Sequence[Tensor | None]
) -> list[Tensor | None] | None:
    """Filters, factor and offset of each scaling, then mean and variance of each export, where a graph is traced.

    Args:
        segment: the segment.
        centers: of each scaling, how much of their mean is taken from filters.
        settings: of the modules.
        tensors: those with gradients, then d, k and U of each scaling.

    Returns:
        None if the segment was laid out for others.
    """
    shapes = tuple(None if t is None else tuple(t.shape) for t in tensors)
    name, layers = _noted(segment, centers, settings, shapes)
    if not name:
        return None
    _, _, *outputs = _segment(name, [t for t in tensors if t is not None])
    rest = iter(outputs)
    scales = [t for has_layer in layers for t in _scale(has_layer == "1", rest)]
    return [*scales, *rest]


def _scale(has_layer: bool, rest: Any) -> tuple[Any, Any, Any]:
    first, offset = next(rest), next(rest)
    return (first, None, offset) if has_layer else (None, first, offset)


@traced_constant
def _noted(
    segment: Segment,
    centers: tuple[float, ...],
    settings: tuple[Setting, ...],
    shapes: tuple[tuple[int, ...] | None, ...],
) -> tuple[str, str]:
    """The name of a traced segment, nothing if it doesn't fit, and which scalings have a layer.

    Runs while the graph is traced, and gives strings, which are no numbers that may vary.
    """
    traced = Traced(segment, segment.forms(centers), settings, tuple(shape is not None for shape in shapes))
    likes = [torch.empty(shape, device="meta") for shape in shapes if shape is not None]
    if not segment.fits(settings, segment.parts(traced.placed(likes)[1])):
        return "", ""
    name = hashlib.sha256(repr(traced).encode() + _SOURCE).hexdigest()[:32]
    _TRACED.setdefault(name, traced)
    return name, "".join(str(int(s.weight is not None)) for s in segment.scalings)


@torch.library.custom_op("normprop::segment", mutates_args=(), device_types="cpu", tags=_TAGS)
def _segment(name: str, tensors: list[Tensor]) -> list[Tensor]:
    traced = _TRACED[name]
    segment = traced.segment
    found, every = traced.placed(tensors)
    parts = segment.parts(every)
    memory, columns, filters = computed(segment, Frame(segment, found, parts), parts)
    outputs = [memory, columns]
    for multiplied, f, b in zip(filters, *(row.split(segment.widths) for row in columns[:2]), strict=True):
        outputs += f.clone() if multiplied is None else multiplied, b.clone()
    for place, shape in segment.exports:
        outputs += (memory[at : at + place.size].clone().view(shape) for at in (place.mean, place.var))
    return outputs


@_segment.register_fake
def _(name: str, tensors: list[Tensor]) -> list[Tensor]:
    traced = _TRACED[name]
    segment = traced.segment
    parts = segment.parts(traced.placed(tensors)[1])
    likes, empty = traced.likes(parts), parts.like.new_empty
    outputs = [empty(segment.size), empty(5, sum(segment.widths))]
    for s, width in zip(segment.scalings, segment.widths, strict=True):
        outputs += empty(width) if s.weight is None else torch.empty_like(likes[s.weight]), empty(width)
    return outputs + [empty(shape) for _, shape in segment.exports for _ in range(2)]


@torch.library.custom_op("normprop::segment_backward", mutates_args=(), device_types="cpu", tags=_TAGS)
def _segment_backward(
    name: str,
    tensors: list[Tensor],
    kept: list[Tensor],
    arrived: list[bool],
    grads: list[Tensor],
    wanted: list[bool],
    inside: list[bool],
) -> list[Tensor]:
    traced = _TRACED[name]
    segment = traced.segment
    found, every = traced.placed(tensors)
    parts, rest = segment.parts(every), iter(grads)
    flat = [next(rest) if here else None for here in arrived]
    memory, columns = kept
    frame = Frame(segment, found, parts)
    by_weights, others = gradients(segment, frame, parts, (memory, columns), flat, wanted, inside=inside)
    return [others, *(t for t in by_weights if t is not None)]


@_segment_backward.register_fake
def _(
    name: str,
    tensors: list[Tensor],
    kept: list[Tensor],
    arrived: list[bool],
    _: list[Tensor],
    wanted: list[bool],
    inside: list[bool],
) -> list[Tensor]:
    traced = _TRACED[name]
    parts = traced.segment.parts(traced.placed(tensors)[1])
    likes = traced.likes(parts)
    reached = _reached(traced.segment, arrived, wanted)
    return [
        kept[0].new_empty(sum(parts.sizes)),
        *(
            t.new_empty(t.shape) if contiguous else torch.empty_like(t)
            for t, here, contiguous in zip(likes, reached, inside, strict=True)
            if here
        ),
    ]


def _reached(segment: Segment, arrived: Sequence[bool], needs: Sequence[bool]) -> list[bool]:
    """Which weights get a gradient."""
    found = [False] * segment.weights
    for i, s in enumerate(segment.scalings):
        if s.weight is not None and needs[s.weight] and (arrived[3 * i] or arrived[3 * i + 2]):
            found[s.weight] = True
    return found


def _keep(ctx: Any, inputs: tuple[str, list[Tensor]], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.name, tensors = inputs
    ctx.save_for_backward(*tensors, *output[:2])


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[None, list[Tensor | None]]:
    *tensors, memory, columns = ctx.saved_tensors
    traced = _TRACED[ctx.name]
    segment = traced.segment
    found, every = traced.placed(tensors)
    parts, rest = segment.parts(every), iter(grads[2:])
    flat = [t for s in segment.scalings for t in _scale(s.weight is not None, rest)] + list(rest)
    asked = ctx.needs_input_grad[1]
    if torch.is_grad_enabled():
        results = gradients_again(lambda t: segment.plain(found, segment.parts(t)), every, flat)
    else:
        arrived, needs = [t is not None for t in flat], list(asked[: segment.weights])
        given = [t for t in flat if t is not None]
        inside = [weight.is_contiguous() for weight in parts.weights]
        others, *by_weights = _segment_backward(ctx.name, tensors, [memory, columns], arrived, given, needs, inside)
        weights = iter(by_weights)
        results = [next(weights) if here else None for here in _reached(segment, arrived, needs)]
        results += apart(segment, parts, others, flat)
    results += [None] * len(found.constants)
    return None, [g for g, known in zip(results, traced.given, strict=True) if known]


_segment.register_autograd(_differentiate, setup_context=_keep)


def _like(weight: Tensor, form: Form) -> Tensor:
    """A weight whose strides are those of its filters and gradient."""
    if not form.transposed and weight.is_contiguous():
        return weight
    return weight if Layer(weight, form).itself else weight.new_empty(weight.shape)
