"""Pooling: averages and maxima of windows whose positions correlate."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normprop.channel_moments import Moments, safe_sqrt
from normprop.errors import NormPropError
from normprop.rules.table import rule

# Correlation between two positions of a window, over the window's own extent. Feature maps are smooth: see docs/pooling.md
# for what was measured. Independent positions would make every average look quieter than it is.
WINDOW_CORRELATION = 0.5
GLOBAL_CORRELATION = 0.2

_LP = "p = 1 and 2 only; Σx² is replaced by its expectation"
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


def order_statistic(count: int) -> tuple[float, float]:
    """Mean and variance of the largest of n independent standard normals: ``∫ x^k n φ(x) Φ(x)^{n−1} dx``."""
    return _order_statistic(count)


# All that torch.compiler.assume_constant_result does; calling it would import the compiler, which takes a second.
order_statistic._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function takes any attribute


@functools.cache
def _order_statistic(count: int) -> tuple[float, float]:
    if count <= 1:
        return 0.0, 1.0
    x = torch.linspace(-12.0, 12.0, 4801, dtype=torch.float64, device="cpu")  # the trapezoid rule is spectrally exact here
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
    dims, divisor = x.mean.dim() - 2, getattr(module, "divisor_override", None)
    return _window_average(x, _extent(module.kernel_size, dims), divisor)


@rule(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, standing="approximate", reason=_REASON)
def functional_average_pool(
    x: Moments,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Moments:
    """See `average_of`."""
    return _window_average(x, _extent(kernel_size, x.mean.dim() - 2), divisor_override)


def _window_average(x: Moments, count: int, divisor: int | None) -> Moments:
    averaged = average_of(_spatial(x, x.mean.dim() - 2), count, WINDOW_CORRELATION)
    return averaged if divisor is None else averaged.scaled(count / divisor)


def _adaptive(x: Moments, in_shape: Sequence[int], out_shape: Sequence[int]) -> tuple[Moments, int, float]:
    dims = len(in_shape) - 2
    count = max(1, math.prod(in_shape[-dims:]) // max(1, math.prod(out_shape[-dims:])))
    whole = math.prod(out_shape[-dims:]) == 1
    return _spatial(x, dims), count, GLOBAL_CORRELATION if whole else WINDOW_CORRELATION


@rule(
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    standing="approximate",
    reason=_REASON,
    shaped=True,
)
def adaptive_average_pool(
    module: nn.Module, x: Moments, *, in_shapes: Sequence[Sequence[int]], out_shape: Sequence[int]
) -> Moments:
    """See `average_of`; the window is what the example's size makes it."""
    x, count, correlation = _adaptive(x, in_shapes[0], out_shape)
    return average_of(x, count, correlation)


@rule(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.adaptive_avg_pool1d,
      standing="approximate", reason=_REASON, shaped=True)  # fmt: skip
def functional_adaptive_average_pool(
    x: Moments, output_size: Any, *, in_shapes: Sequence[Sequence[int]], out_shape: Sequence[int]
) -> Moments:
    """See `average_of`."""
    x, count, correlation = _adaptive(x, in_shapes[0], out_shape)
    return average_of(x, count, correlation)


@rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, standing="approximate", reason=_REASON + ", and to be Gaussian")
def max_pool(module: nn.MaxPool2d, x: Moments) -> Moments | tuple[Moments, None]:
    """See `maximum_of`; indices have no moments."""
    found = functional_max_pool(x, module.kernel_size)
    return (found, None) if module.return_indices else found


@rule(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
      standing="approximate", reason=_REASON + ", and to be Gaussian")  # fmt: skip
def functional_max_pool(x: Moments, kernel_size: Any, *_: Any, **__: Any) -> Moments:
    """See `maximum_of`."""
    dims = x.mean.dim() - 2
    return maximum_of(_spatial(x, dims), _extent(kernel_size, dims), WINDOW_CORRELATION)


@rule(F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices, standing="approximate",
      reason=_REASON + ", and to be Gaussian")  # fmt: skip
def max_pool_with_indices(x: Moments, kernel_size: Any, *_: Any, **__: Any) -> tuple[Moments, None]:
    """See `maximum_of`; indices have no moments."""
    return functional_max_pool(x, kernel_size), None


@rule(nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d, standing="approximate", shaped=True,
      reason="windows are taken not to overlap")  # fmt: skip
def max_unpool(
    module: nn.Module, x: Moments, indices: None, output_size: Any = None, *, in_shapes: Sequence[Sequence[int]],
    out_shape: Sequence[int],
) -> Moments:  # fmt: skip
    """One position in so many has a value, the others are 0: with the share s, ``E = s m``, ``E y² = s (v + m²)``."""
    dims = len(out_shape) - 2
    x = _spatial(x, dims)
    share = math.prod(in_shapes[0][-dims:]) / math.prod(out_shape[-dims:])
    return Moments(share * x.mean, share * x.second - (share * x.mean).square())


@rule(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, standing="approximate",
      reason=_REASON + ", and to be Gaussian", shaped=True)  # fmt: skip
def adaptive_max_pool(
    module: nn.Module, x: Moments, *, in_shapes: Sequence[Sequence[int]], out_shape: Sequence[int]
) -> Moments:
    """See `maximum_of`."""
    x, count, correlation = _adaptive(x, in_shapes[0], out_shape)
    return maximum_of(x, count, correlation)


@rule(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d, standing="approximate",
      reason=_REASON + ", and to be Gaussian", shaped=True)  # fmt: skip
def functional_adaptive_max_pool(
    x: Moments, output_size: Any, *_: Any, in_shapes: Sequence[Sequence[int]], out_shape: Sequence[int], **__: Any
) -> Moments:
    """See `maximum_of`."""
    x, count, correlation = _adaptive(x, in_shapes[0], out_shape)
    return maximum_of(x, count, correlation)


@rule(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, standing="approximate", reason=_LP)
def power_average_pool(module: nn.LPPool2d, x: Moments) -> Moments:
    """See `functional_power_average_pool`."""
    return functional_power_average_pool(x, module.norm_type, module.kernel_size)


@rule(F.lp_pool1d, F.lp_pool2d, F.lp_pool3d, standing="approximate", reason=_LP)
def functional_power_average_pool(
    x: Moments, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
) -> Moments:
    """``Σ x`` for p = 1; for p = 2 see `length_of`."""
    dims = x.mean.dim() - 2
    count = _extent(kernel_size, dims)
    x = _spatial(x, dims)
    if norm_type == 1:
        return average_of(x, count, WINDOW_CORRELATION).scaled(float(count))
    if norm_type != 2:
        raise NormPropError(f"LPPool with p={norm_type} has no moment rule; p=1 and p=2 have.")
    return length_of(x, count, WINDOW_CORRELATION)


def length_of(x: Moments, count: int, correlation: float) -> Moments:
    """``(Σ x²)^½ ≈ √(n E x²)`` with the spread ``Var ≈ Var(Σx²) / (4 n E x²)`` (delta method).

    For Gaussians of pairwise correlation ρ, ``Var Σx² = n (2v² (1 + (n−1)ρ²) + 4 v m² (1 + (n−1)ρ))``.
    """
    others = (count - 1) * correlation
    square_var = 2.0 * x.var.square() * (1.0 + others * correlation) + 4.0 * x.var * x.mean.square() * (1.0 + others)
    second = x.second.clamp(min=torch.finfo(x.var.dtype).tiny)
    return Moments(safe_sqrt(count * second), square_var / (4.0 * second))
