"""Activations that lanes integrate by nodes, as compiled functions read them."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from normprop.activations.panels import DOUBLE, SINGLE, lane_panels
from normprop.activations.piecewise import Piecewise
from normprop.native.library import library
from normprop.native.structures import Curve

_TOGETHER, _MOST_NODES = 8, 512  # as in curves.h


class _Kind(IntEnum):
    """The functions of curves.h, in its order."""

    PIECEWISE, SIGMOID, TANH, SILU, MISH, SOFTPLUS, EXPONENTIAL, GELU, GELU_TANH = range(9)


@functools.lru_cache(maxsize=256)
def native_curve(name: str, parameters: tuple[tuple[str, Any], ...], exact: bool) -> Curve | None:
    """A named activation with its nodes; None if it isn't among the compiled ones.

    Args:
        name: as for `activation_moments`.
        parameters: of the activation, sorted by name.
        exact: with the nodes of double precision.
    """
    if any(isinstance(value, Tensor) for _, value in parameters):
        return None
    panels = lane_panels(name, parameters, DOUBLE if exact else SINGLE)
    if panels is None:
        return None
    rules = [(_padded(nodes, 0.5), _padded(weights / math.sqrt(2 * math.pi), 0.0)) for nodes, weights in panels.rules]
    counts = [len(nodes) for nodes, _ in rules]
    if sum(counts) > _MOST_NODES:
        return None
    form = panels.form
    found = Curve(panels=len(counts), reach=panels.reach, kinked=panels.kinked)
    found.near, found.far = panels.smallest(torch.finfo(torch.float64).eps)
    if isinstance(form, Piecewise):
        found.kind = _Kind.PIECEWISE
        pieces = [(p.c0, p.c1, p.c2, p.origin) for p in form.pieces]
        found.keep("knots", _doubles(map(float, form.knots)))
        found.keep("pieces", _doubles(float(number) for piece in pieces for number in piece))
    else:
        if not form.code:
            return None
        found.kind = _Kind[str(form.code[0])]
        found.bend = form.scale * form.straight
        for field, number in zip("abc", form.code[1:], strict=False):
            setattr(found, field, number)
    found.keep("counts", (ctypes.c_int64 * len(counts))(*counts))
    found.keep("places", _doubles(t for nodes, _ in rules for t in nodes))
    found.keep("weights", _doubles(t for _, weights in rules for t in weights))
    return found


def curve_moments(curve: Curve, mean: Tensor, var: Tensor) -> list[Tensor]:
    """E f, Var f, ∂E/∂m, ∂E/∂v, ∂Var/∂m and ∂Var/∂v for u ~ N(m, v), ``(n,)`` each, by the compiled functions.

    Args:
        curve: f.
        mean: m, ``(n,)``, on the CPU, in single or double precision.
        var: v.
    """
    native = library()
    assert not isinstance(native, str)
    numbers = mean.new_empty(8, len(mean))
    numbers[0], numbers[1] = mean, var
    native.curve(curve, numbers)
    return list(numbers[2:].unbind())


def _padded(numbers: Tensor, with_: float) -> list[float]:
    return [*numbers.tolist(), *[with_] * (-len(numbers) % _TOGETHER)]


def _doubles(numbers: Iterable[float]) -> ctypes.Array[ctypes.c_double]:
    listed = list(numbers)
    return (ctypes.c_double * len(listed))(*listed)
