"""Pooling: averages and maxima of windows whose positions correlate."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.rules.table import rule

# Correlation between two positions of a window, over the window's own extent. Feature maps are smooth: see docs/convert.md
# for what was measured. Independent positions would make every average look quieter than it is.
WINDOW_CORRELATION = 0.5
GLOBAL_CORRELATION = 0.1

_REASON = "positions of a window are taken to correlate by a fixed amount"


def average_of(x: Moments, count: int, correlation: float) -> Moments:
    """Mean of `count` elements with equal pairwise correlation ρ: ``v (1 + (n−1)ρ)/n`` (exact for equal correlation)."""
    return Moments(x.mean, x.var * ((1.0 + (count - 1) * correlation) / count))


def maximum_of(x: Moments, count: int, correlation: float) -> Moments:
    """Largest of `count` Gaussians with equal pairwise correlation ρ.

    ``√ρ z + √(1−ρ) max_i y_i``, hence mean ``m + √((1−ρ)v) μ_n`` and variance ``v (ρ + (1−ρ) σ_n²)`` with the moments
    μ_n, σ_n² of the largest of n independent standard normals (exact for Gaussians with equal correlation).
    """
    largest, spread = order_statistic(count)
    return Moments(
        x.mean + x.std * (math.sqrt(1.0 - correlation) * largest),
        x.var * (correlation + (1.0 - correlation) * spread),
    )


@functools.cache
def order_statistic(count: int) -> tuple[float, float]:
    """Mean and variance of the largest of n independent standard normals: ``∫ x^k n φ(x) Φ(x)^{n−1} dx``."""
    if count <= 1:
        return 0.0, 1.0
    x = torch.linspace(-12.0, 12.0, 4801, dtype=torch.float64)  # the trapezoid rule is spectrally exact here
    density = torch.exp(math.log(count) - 0.5 * x.square() + (count - 1) * torch.special.log_ndtr(x))
    density = density * ((24.0 / 4800) / math.sqrt(2 * math.pi))
    mean = float((density * x).sum())
    return mean, float((density * (x - mean).square()).sum())


def _extent(size: Any, dims: int) -> int:
    return math.prod(size) if isinstance(size, Sequence) else int(size) ** dims


def _spatial(x: Moments, dims: int) -> Moments:
    return x if all(s == 1 for s in x.mean.shape[-dims:]) else x.pooled(list(range(-dims, 0)))


@rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, standing="approximate", reason=_REASON)
def average_pool(module: nn.AvgPool2d, x: Moments) -> Moments:
    """See `average_of`; borders are not counted."""
    dims = int(type(module).__name__[-2])
    return average_of(_spatial(x, dims), _extent(module.kernel_size, dims), WINDOW_CORRELATION)


@rule(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, standing="approximate", reason=_REASON, shaped=True)
def functional_average_pool(
    x: Moments, kernel_size: Any, *_: Any, in_shapes: Any, out_shape: Sequence[int], **__: Any
) -> Moments:
    """See `average_of`."""
    dims = x.mean.dim() - 2
    return average_of(_spatial(x, dims), _extent(kernel_size, dims), WINDOW_CORRELATION)


def _adaptive(x: Moments, in_shape: Sequence[int], out_shape: Sequence[int]) -> tuple[Moments, int, float, int]:
    dims = len(in_shape) - 2
    count = max(1, math.prod(in_shape[-dims:]) // max(1, math.prod(out_shape[-dims:])))
    whole = math.prod(out_shape[-dims:]) == 1
    return _spatial(x, dims), count, GLOBAL_CORRELATION if whole else WINDOW_CORRELATION, dims


@rule(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, standing="approximate", reason=_REASON, shaped=True)
def adaptive_average_pool(
    module: nn.Module, x: Moments, *, in_shapes: Sequence[Sequence[int]], out_shape: Sequence[int]
) -> Moments:
    """See `average_of`; the window is what the example's size makes it."""
    x, count, correlation, _ = _adaptive(x, in_shapes[0], out_shape)
    return average_of(x, count, correlation)


@rule(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.adaptive_avg_pool1d,
      standing="approximate", reason=_REASON, shaped=True)  # fmt: skip
def functional_adaptive_average_pool(
    x: Moments, output_size: Any, *, in_shapes: Sequence[Sequence[int]], out_shape: Sequence[int]
) -> Moments:
    """See `average_of`."""
    x, count, correlation, _ = _adaptive(x, in_shapes[0], out_shape)
    return average_of(x, count, correlation)


@rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, standing="approximate", reason=_REASON + ", and to be Gaussian")
def max_pool(module: nn.MaxPool2d, x: Moments) -> Moments:
    """See `maximum_of`."""
    dims = int(type(module).__name__[-2])
    return maximum_of(_spatial(x, dims), _extent(module.kernel_size, dims), WINDOW_CORRELATION)


@rule(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
      standing="approximate", reason=_REASON + ", and to be Gaussian")  # fmt: skip
def functional_max_pool(x: Moments, kernel_size: Any, *_: Any, **__: Any) -> Moments:
    """See `maximum_of`."""
    dims = x.mean.dim() - 2
    return maximum_of(_spatial(x, dims), _extent(kernel_size, dims), WINDOW_CORRELATION)


@rule(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, standing="approximate",
      reason=_REASON + ", and to be Gaussian", shaped=True)  # fmt: skip
def adaptive_max_pool(
    module: nn.Module, x: Moments, *, in_shapes: Sequence[Sequence[int]], out_shape: Sequence[int]
) -> Moments:
    """See `maximum_of`."""
    x, count, correlation, _ = _adaptive(x, in_shapes[0], out_shape)
    return maximum_of(x, count, correlation)


@rule(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d, standing="approximate",
      reason=_REASON + ", and to be Gaussian", shaped=True)  # fmt: skip
def functional_adaptive_max_pool(
    x: Moments, output_size: Any, *_: Any, in_shapes: Sequence[Sequence[int]], out_shape: Sequence[int], **__: Any
) -> Moments:
    """See `maximum_of`."""
    x, count, correlation, _ = _adaptive(x, in_shapes[0], out_shape)
    return maximum_of(x, count, correlation)


@rule(nn.LPPool1d, nn.LPPool2d, standing="approximate", reason="p = 2 only, and Σx² is replaced by its expectation")
def power_average_pool(module: nn.LPPool2d, x: Moments) -> Moments:
    """``(Σ x²)^½ ≈ √(n E x²)`` with the spread ``Var ≈ Var(Σx²) / (4 n E x²)`` (delta method)."""
    if module.norm_type != 2:
        raise NormPropError(f"LPPool with p={module.norm_type} has no moment rule; p=2 has.")
    dims = int(type(module).__name__[-2])
    x, count = _spatial(x, dims), _extent(module.kernel_size, dims)
    square_var = 2.0 * x.var.square() + 4.0 * x.var * x.mean.square()
    return Moments((count * x.second).sqrt(), square_var / (4.0 * x.second))


def _reduced(x: Moments, dim: Any, keepdim: bool, shape: Sequence[int], total: bool) -> Moments:
    rank = len(shape)
    dims = [d % rank for d in (range(rank) if dim is None else (dim,) if isinstance(dim, int) else dim)]
    count = math.prod(shape[d] for d in dims)
    channels = [d for d in dims if x.mean.shape[d] != 1]
    correlation = GLOBAL_CORRELATION if not channels else 0.0
    pooled = Moments(x.mean.mean(dims, keepdim=keepdim), x.var.mean(dims, keepdim=keepdim))
    averaged = average_of(pooled, count, correlation)
    return averaged.scaled(float(count)) if total else averaged


@rule(torch.mean, "mean", standing="approximate", reason=_REASON, shaped=True)
def mean(
    x: Moments, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, in_shapes: Any, out_shape: Any
) -> Moments:
    """Average over dimensions: positions correlate as in a global pooling, channels are independent (see `average_of`)."""
    return _reduced(x, dim, keepdim, in_shapes[0], total=False)


@rule(torch.sum, "sum", standing="approximate", reason=_REASON, shaped=True)
def total(
    x: Moments, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, in_shapes: Any, out_shape: Any
) -> Moments:
    """Sum over dimensions, as `mean`."""
    return _reduced(x, dim, keepdim, in_shapes[0], total=True)
