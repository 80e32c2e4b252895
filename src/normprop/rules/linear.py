"""Linear maps: ``E z_o = Σ W_oiδ m_i + b_o`` and ``Var z_o = Σ W_oiδ² v_i`` (Arpit et al., 2016, §3; means derived)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.precision import full_precision, wide
from normprop.rules.table import Standing, rule


def weight_moments(
    weight: Tensor, mean: Tensor, var: Tensor, *, groups: int = 1, transposed_stride: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a bias-free linear map's output, one vector each.

    Exact for inputs whose elements are uncorrelated; positions which see the padding are not counted.

    Args:
        weight: ``(O, I/groups, …)`` as torch's layers store it, or ``(I, O/groups, …)`` if transposed.
        mean: input mean per channel, ``(I,)``.
        var: input variance per channel, ``(I,)``.
        groups: of a grouped convolution.
        transposed_stride: product of the strides of a transposed convolution, 0 for any other map. An output position
            then sees one tap in so many, and the average position is described.

    Returns:
        ``(Σ W m, Σ W² v)``, each ``(O,)``.
    """
    weight = wide(weight)
    if transposed_stride:
        taps = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        equation, share = "giok,gi->go", 1.0 / transposed_stride
    else:
        taps = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        equation, share = "goik,gi->go", 1.0
    mean, var = mean.to(taps.dtype).reshape(groups, -1), var.to(taps.dtype).reshape(groups, -1)
    with full_precision(weight):
        first = torch.einsum(equation, taps, mean).reshape(-1)
        second = torch.einsum(equation, taps.square(), var).reshape(-1)
    return (first, second) if share == 1.0 else (first * share, second * share)


def _fixed_weight(x: Any, weight: Any, *_: Any, **__: Any) -> tuple[Standing, str] | None:
    return ("unsupported", "its weight depends on the input") if weight is Moments else None


def _convolution(x: Moments, weight: Tensor, bias: Tensor | None, dims: int, *, groups: int = 1) -> Moments:
    channel = -1 - dims
    channels = x.channels(channel).expanded((weight.shape[1] * groups,))
    first, second = weight_moments(weight, channels.mean, channels.var, groups=groups)
    if bias is not None:
        first = first + wide(bias)
    return Moments(first, second).aligned(x.mean.dim(), channel)


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Moments) -> Moments:
    """Any stride, padding, dilation: ``E = Σ_iδ W m + b``, ``Var = Σ_iδ W² v`` (eq. 11; borders not counted)."""
    return _convolution(x, module.weight, module.bias, len(module.kernel_size), groups=module.groups)


@rule(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, judge=_fixed_weight)
def functional_convolution(
    x: Moments,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Moments:
    """As `convolution`; stride, padding and dilation do not change the moments."""
    return _convolution(x, weight, bias, weight.dim() - 2, groups=groups)


def _transposed(
    x: Moments, weight: Tensor, bias: Tensor | None, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Moments:
    """Moments over all output positions away from the borders.

    A tap at k reaches the positions of one phase, ``k · dilation mod stride``, so the phases are linear maps of their own
    with the means ``E_p = Σ_{taps of p} W m``. With P = ∏stride phases, as frequent as each other (law of total variance):
    ``E = Σ_p E_p / P + b`` and ``Var = Σ W² v / P + Σ_p (E_p − E)² / P``.
    """
    dims, phases = len(stride), math.prod(stride)
    channels = x.channels(-1 - dims).expanded((weight.shape[0],))
    first, second = weight_moments(weight, channels.mean, channels.var, groups=groups, transposed_stride=phases)
    if phases > 1:
        filters = wide(weight).unflatten(0, (groups, -1))
        means = channels.mean.to(filters.dtype).reshape(groups, -1)
        with full_precision(weight):
            by_tap = torch.einsum("gio...,gi->go...", filters, means).flatten(0, 1)
        for dim in range(dims):
            tap = torch.arange(by_tap.shape[1 + dim], device=weight.device)
            shape = list(by_tap.shape)
            shape[1 + dim] = stride[dim]
            by_tap = by_tap.new_zeros(shape).index_add(1 + dim, tap * dilation[dim] % stride[dim], by_tap)
        second = second + (by_tap.flatten(1) - first.unsqueeze(1)).square().mean(1)
    if bias is not None:
        first = first + wide(bias)
    return Moments(first, second).aligned(x.mean.dim(), -1 - dims)


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(
    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, x: Moments, output_size: Any = None
) -> Moments:
    """Mixture of the phases of the stride: ``E = Σ W m / ∏s + b``, ``Var = Σ W² v / ∏s + Var_p E_p`` (see `_transposed`)."""
    return _transposed(x, module.weight, module.bias, module.stride, module.dilation, module.groups)


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, judge=_fixed_weight)
def functional_transposed_convolution(
    x: Moments,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Moments:
    """As `transposed_convolution`."""
    dims = weight.dim() - 2
    strides, dilations = ((n,) * dims if isinstance(n, int) else n for n in (stride, dilation))
    return _transposed(x, weight, bias, strides, dilations, groups)


@rule(F.linear, judge=_fixed_weight)
def functional_linear(x: Moments, weight: Tensor, bias: Tensor | None = None) -> Moments:
    """Over the last dimension: ``E = W m + b``, ``Var = W² v`` (Arpit et al., 2016, eq. 9)."""
    weight = wide(weight)
    x = x.expanded((*x.mean.shape[:-1], weight.shape[1]))
    with full_precision(weight):
        mean = F.linear(x.mean.to(weight.dtype), weight, None if bias is None else wide(bias))
        return Moments(mean, F.linear(x.var.to(weight.dtype), weight.square()))


@rule(nn.Linear)
def linear(module: nn.Linear, x: Moments) -> Moments:
    """As `functional_linear`."""
    return functional_linear(x, module.weight, module.bias)


@rule(nn.Bilinear)
def bilinear(module: nn.Bilinear, x: Moments, y: Moments) -> Moments:
    """``z_o = Σ_ij W_oij x_i y_j + b_o`` of independent x and y; terms that share x_i or y_j correlate through the means.

    ``Var = Σ W²(v_i v_j) + Σ_i v_i (Σ_j W m_j)² + Σ_j v_j (Σ_i W m_i)²`` (derived: law of total variance).
    """
    weight = wide(module.weight)
    x = x.expanded((*x.mean.shape[:-1], weight.shape[1]))
    y = y.expanded((*y.mean.shape[:-1], weight.shape[2]))
    by_x = torch.einsum("oij,...j->...oi", weight, y.mean)
    by_y = torch.einsum("oij,...i->...oj", weight, x.mean)
    var = torch.einsum("oij,...i,...j->...o", weight.square(), x.var, y.var)
    var = var + (by_x.square() * x.var.unsqueeze(-2)).sum(-1) + (by_y.square() * y.var.unsqueeze(-2)).sum(-1)
    mean = (by_x * x.mean.unsqueeze(-2)).sum(-1)
    return Moments(mean if module.bias is None else mean + wide(module.bias), var)


@rule(nn.Embedding)
def embedding(module: nn.Embedding, x: Moments) -> Moments:
    """A row drawn evenly from the table: mean and variance of each column over the rows (by definition)."""
    table = wide(module.weight)
    shape = (1,) * x.mean.dim() + (-1,)
    return Moments(table.mean(0).reshape(shape), table.var(0, unbiased=False).reshape(shape))
