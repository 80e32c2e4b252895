"""Reductions over dimensions: mean, sum, maximum, norm, variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from normprop.channel_moments import Moments, safe_sqrt
from normprop.errors import NormPropError
from normprop.rules import pooling
from normprop.rules.arithmetic import Term, maximum, minimum, neg
from normprop.rules.pooling import average_of, length_of, maximum_of
from normprop.rules.table import Standing, rule

Shape = Sequence[int]
Shapes = Sequence[Shape]

_POSITIONS = "positions are taken to correlate by a fixed amount, channels to be independent"
_GAUSSIAN = _POSITIONS + ", both to be Gaussian"


class _Reduction:
    """What a reduction of a tensor of some shape runs over.

    Attributes:
        dims: the dimensions, not negative.
        channels: number of elements along those over which the moments vary; these are taken as independent.
        positions: number of elements along the others; these correlate as in a global pooling.
        mixture: moments pooled over the dimensions, which stay with size 1.
        averaged: as `mixture`, but with the mean variance only: what an average over channels starts from.
    """

    def __init__(self, x: Moments, dim: Any, shape: Shape) -> None:
        rank = len(shape)
        chosen = range(rank) if dim is None or dim == () else (dim,) if isinstance(dim, int) else dim
        self.dims = [d % rank for d in chosen]
        varying = [d for d in self.dims if max(x.mean.shape[d], x.var.shape[d]) != 1]
        self.channels = math.prod(shape[d] for d in varying)
        self.positions = math.prod(shape[d] for d in self.dims if d not in varying)
        self.count = self.channels * self.positions
        self.correlation = pooling.GLOBAL_CORRELATION if self.channels == 1 else 0.0
        self.mixture = x.pooled(self.dims)
        self.averaged = Moments(self.mixture.mean, x.var.mean(self.dims, keepdim=True))

    def finish(self, x: Moments, keepdim: bool) -> Moments:
        """The result, without the dimensions if they go."""
        if keepdim:
            return x
        dims = tuple(self.dims)
        mean, var = torch.broadcast_tensors(x.mean, x.var)
        return Moments(mean.squeeze(dims), var.squeeze(dims))


def _average(x: Moments, dim: Any, shape: Shape, keepdim: bool, *, total: bool) -> Moments:
    over = _Reduction(x, dim, shape)
    found = average_of(average_of(over.averaged, over.channels, 0.0), over.positions, pooling.GLOBAL_CORRELATION)
    return over.finish(found.scaled(float(over.count)) if total else found, keepdim)


@rule(torch.mean, "mean", standing="approximate", reason=_POSITIONS, shaped=True)
def mean(
    x: Moments, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, in_shapes: Shapes, out_shape: Shape
) -> Moments:
    """``v (1 + (n−1)ρ)/n`` over positions, ``v/n`` over channels (see `average_of`)."""
    return _average(x, dim, in_shapes[0], keepdim, total=False)


@rule(torch.sum, "sum", standing="approximate", reason=_POSITIONS, shaped=True)
def total(
    x: Moments, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, in_shapes: Shapes, out_shape: Shape
) -> Moments:
    """n times the mean, as `mean`."""
    return _average(x, dim, in_shapes[0], keepdim, total=True)


@rule(torch.amax, "amax", standing="approximate", reason=_GAUSSIAN, shaped=True)
def amax(x: Moments, dim: Any = (), keepdim: bool = False, *, in_shapes: Shapes, out_shape: Shape) -> Moments:
    """The largest of n Gaussians (see `maximum_of`), with the mixture's moments where channels differ."""
    over = _Reduction(x, dim, in_shapes[0])
    return over.finish(maximum_of(over.mixture, over.count, over.correlation), keepdim)


@rule(torch.amin, "amin", standing="approximate", reason=_GAUSSIAN, shaped=True)
def amin(x: Moments, dim: Any = (), keepdim: bool = False, *, in_shapes: Shapes, out_shape: Shape) -> Moments:
    """``−max(−x)``."""
    return neg(amax(neg(x), dim, keepdim, in_shapes=in_shapes, out_shape=out_shape))


def _of_two(_: Any, *args: Any, **kwargs: Any) -> tuple[Standing, str] | None:
    return ("exact", "") if _max_arguments(*args, **kwargs)[2] is not None else None


@rule(torch.max, "max", standing="approximate", reason=_GAUSSIAN, shaped=True, judge=_of_two)
def max_(x: Moments, *args: Any, in_shapes: Shapes, out_shape: Shape | None, **kwargs: Any) -> Any:
    """Of all elements, along a dimension (with indices, which have no moments), or of two tensors (`maximum`)."""
    dim, keepdim, other = _max_arguments(*args, **kwargs)
    if other is not None:
        return maximum(x, other)
    found = amax(x, dim, keepdim, in_shapes=in_shapes, out_shape=())
    return found if dim is None else (found, None)


@rule(torch.min, "min", standing="approximate", reason=_GAUSSIAN, shaped=True, judge=_of_two)
def min_(x: Moments, *args: Any, in_shapes: Shapes, out_shape: Shape | None, **kwargs: Any) -> Any:
    """As `max_`."""
    dim, keepdim, other = _max_arguments(*args, **kwargs)
    if other is not None:
        return minimum(x, other)
    found = amin(x, dim, keepdim, in_shapes=in_shapes, out_shape=())
    return found if dim is None else (found, None)


def _max_arguments(dim: Any = None, keepdim: bool = False, *, other: Term | None = None) -> tuple[Any, bool, Any]:
    """The two ways to call torch.max with more than a tensor, told apart."""
    return (dim, keepdim, other) if dim is None or isinstance(dim, int) else (None, keepdim, dim)


@rule(torch.var, "var", standing="approximate", reason=_GAUSSIAN, shaped=True)
def variance(
    x: Moments, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None, in_shapes: Shapes,
    out_shape: Shape,
) -> Moments:  # fmt: skip
    """``s²`` of n elements: ``E ≈ v (1−ρ) + Var m_c`` and ``Var ≈ 2 E²/(n−1)`` (equicorrelated Gaussians)."""
    over = _Reduction(x, dim, in_shapes[0])
    spread = over.mixture.var - over.correlation * over.averaged.var
    correction = int(bool(unbiased)) if correction is None else correction
    spread = spread * ((over.count - 1) / max(over.count - correction, 1))
    return over.finish(Moments(spread, 2.0 * spread.square() / max(over.count - 1, 1)), keepdim)


@rule(torch.std, "std", standing="approximate", reason=_GAUSSIAN, shaped=True)
def deviation(
    x: Moments, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None, in_shapes: Shapes,
    out_shape: Shape,
) -> Moments:  # fmt: skip
    """The root of `variance`: ``√E`` and ``Var/(4E)`` (delta method)."""
    squared = variance(x, dim, unbiased, keepdim, correction=correction, in_shapes=in_shapes, out_shape=out_shape)
    tiny = torch.finfo(squared.mean.dtype).tiny
    return Moments(safe_sqrt(squared.mean), squared.var / (4.0 * squared.mean).clamp(min=tiny))


@rule(torch.var_mean, standing="approximate", reason=_GAUSSIAN, shaped=True)
def variance_and_mean(
    x: Moments, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None, in_shapes: Shapes,
    out_shape: Any,
) -> tuple[Moments, Moments]:  # fmt: skip
    """`variance` and `mean`, taken as independent (of Gaussians they are)."""
    options: Any = {"in_shapes": in_shapes, "out_shape": ()}
    return (
        variance(x, dim, unbiased, keepdim, correction=correction, **options),
        mean(x, dim, keepdim, **options),
    )


@rule(torch.std_mean, standing="approximate", reason=_GAUSSIAN, shaped=True)
def deviation_and_mean(
    x: Moments, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None, in_shapes: Shapes,
    out_shape: Any,
) -> tuple[Moments, Moments]:  # fmt: skip
    """`deviation` and `mean`."""
    options: Any = {"in_shapes": in_shapes, "out_shape": ()}
    return (
        deviation(x, dim, unbiased, keepdim, correction=correction, **options),
        mean(x, dim, keepdim, **options),
    )


@rule(torch.norm, "norm", torch.linalg.vector_norm, torch.functional.norm, standing="approximate",
      reason="p = 2 only; " + _GAUSSIAN, shaped=True)  # fmt: skip
def norm(
    x: Moments, p: Any = 2, dim: Any = None, keepdim: bool = False, *, ord: Any = None, in_shapes: Shapes, out_shape: Shape,
    out: None = None, dtype: Any = None,
) -> Moments:  # fmt: skip
    """``‖x‖₂ over dimensions (see `length_of`)."""
    if (ord if ord is not None else p) not in (2, "fro"):
        raise NormPropError("a norm with another p than 2 has no moment rule.")
    over = _Reduction(x, dim, in_shapes[0])
    return over.finish(length_of(over.mixture, over.count, over.correlation), keepdim)


@rule(F.normalize, shaped=True, standing="approximate", reason="the norm of each vector is replaced by its expectation")
def normalize(
    x: Moments, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None, *, in_shapes: Shapes, out_shape: Shape
) -> Moments:  # fmt: skip
    """``x / ‖x‖₂ ≈ x / √(Σ E x²)`` along one dimension (law of large numbers)."""
    if p != 2.0:
        raise NormPropError(f"normalize with p={p} has no moment rule; only p=2 has.")
    length = x.second.mean(dim, keepdim=True) * in_shapes[0][dim]
    return x.scaled(1.0 / safe_sqrt(length).clamp(min=eps))
