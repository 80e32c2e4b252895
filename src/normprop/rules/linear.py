"""Linear maps: ``E z_o = Σ W_oiδ m_i + b_o`` and ``Var z_o = Σ W_oiδ² v_i`` ([P] §3, METHOD §3 for means)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.rules.table import rule


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: moments of half-precision networks are not computed in half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off on the tensor's device; the meta device knows no autocast."""
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


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


def _known(weight: Any) -> None:
    if isinstance(weight, Moments):
        raise NormPropError("a weight that depends on the input has no moment rule.\nKeep the layer whole and register one.")


def _convolution(
    x: Moments, weight: Tensor, bias: Tensor | None, dims: int, *, groups: int = 1, transposed_stride: int = 0
) -> Moments:
    _known(weight)
    channel = -1 - dims
    channels = x.channels(channel)
    inputs = weight.shape[0] if transposed_stride else weight.shape[1] * groups
    channels = channels.expanded((inputs,))
    first, second = weight_moments(weight, channels.mean, channels.var, groups=groups, transposed_stride=transposed_stride)
    if bias is not None:
        first = first + wide(bias)
    return Moments(first, second).aligned(x.mean.dim(), channel)


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Moments) -> Moments:
    """Any stride, padding, dilation: ``E = Σ_iδ W m + b``, ``Var = Σ_iδ W² v`` ([P] eq. 11; borders not counted)."""
    return _convolution(x, module.weight, module.bias, len(module.kernel_size), groups=module.groups)


@rule(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
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
    _known(weight)
    return _convolution(x, weight, bias, weight.dim() - 2, groups=groups)


_PHASES = "exact where the mean is zero or the stride is one: the phases of a stride see different taps, which are averaged"


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, standing="approximate", reason=_PHASES)
def transposed_convolution(
    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, x: Moments, output_size: Any = None
) -> Moments:
    """The average output position: a tap in ∏stride reaches it, ``E = Σ W m / ∏s + b``, ``Var = Σ W² v / ∏s`` (derived)."""
    stride = math.prod(module.stride)
    return _convolution(
        x, module.weight, module.bias, len(module.kernel_size), groups=module.groups, transposed_stride=stride
    )


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, standing="approximate", reason=_PHASES)
def functional_transposed_convolution(
    x: Moments,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Moments:
    """As `transposed_convolution`."""
    dims = weight.dim() - 2
    product = stride**dims if isinstance(stride, int) else math.prod(stride)
    return _convolution(x, weight, bias, dims, groups=groups, transposed_stride=product)


@rule(F.linear)
def functional_linear(x: Moments, weight: Tensor, bias: Tensor | None = None) -> Moments:
    """Over the last dimension: ``E = W m + b``, ``Var = W² v`` ([P] eq. 9)."""
    _known(weight)
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
