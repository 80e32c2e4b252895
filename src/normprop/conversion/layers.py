"""Operations of the data lane: torch's own layers, scaled by their sites."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.sites.reference import Scale

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def linear(x: Tensor, scale: Scale) -> Tensor:
    """``F.linear`` with scaled filters.

    Args:
        x: ``(…, I)``.
        scale: of the site behind the layer, filters ``(O, I)``.
    """
    weight = _filters(scale)
    if _on_weight(scale, x.numel() / weight.shape[1] * weight.shape[0]):
        return F.linear(x, _like(scaled_weight(scale), x), _like(scale.offset, x))
    scaled = affine(F.linear(x, _like(weight, x)), scale, -1)
    return scaled if scale.average is None else _centred(scaled, x.sum(-1, keepdim=True), scale, -1)


def convolution(x: Tensor, scale: Scale, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """``F.conv1d``, ``conv2d`` or ``conv3d`` with scaled filters.

    Args:
        x: ``(N, I, …)``, or ``(I, …)``.
        scale: of the site behind the layer, filters ``(O, I/groups, …)``.
        stride: as in torch, and so on.
        padding: zeros, or "same".
        dilation: of the filters.
        groups: of channels.
    """
    weight = _filters(scale)
    dims = weight.dim() - 2
    function, rest = _CONVOLUTIONS[dims - 1], (stride, padding, dilation, groups)
    if _on_weight(scale, _outputs(x, len(scale.offset), dims, 1.0 / _product(stride, dims))):
        return function(x, _like(scaled_weight(scale), x), _like(scale.offset, x), *rest)
    return _scaled(function, x, scale, rest)


def transposed_convolution(
    x: Tensor, scale: Scale, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> Tensor:
    """``F.conv_transpose1d``, ``2d`` or ``3d`` with scaled filters.

    Args:
        x: ``(N, I, …)``, or ``(I, …)``.
        scale: of the site behind the layer, filters ``(I, O/groups, …)``.
        stride: as in torch, and so on.
        padding: taken away from both sides.
        output_padding: added to one side.
        groups: of channels.
        dilation: of the filters.
    """
    weight = _filters(scale)
    dims = weight.dim() - 2
    function, rest = _TRANSPOSED[dims - 1], (stride, padding, output_padding, groups, dilation)
    if _on_weight(scale, _outputs(x, len(scale.offset), dims, _product(stride, dims))):
        scaled = scaled_weight(scale, transposed_groups=groups)
        return function(x, _like(scaled, x), _like(scale.offset, x), *rest)
    return _scaled(function, x, scale, rest)


def affine(x: Tensor, scale: Scale, channel: int) -> Tensor:
    """``x · factor + offset`` per channel, in x's own dtype.

    Args:
        x: any tensor.
        scale: of a site.
        channel: dimension of the channels, counted from the end: -1 is the last.
    """
    factor, offset = per_channel(scale, channel)
    return torch.addcmul(offset.to(x.dtype), x, factor.to(x.dtype))


def per_channel(scale: Scale, channel: int) -> tuple[Tensor, Tensor]:
    """Factor and offset in a shape that broadcasts along the given dimension, which is counted from the end."""
    assert scale.factor is not None
    shape = (-1, *[1] * (-1 - channel))
    return scale.factor.reshape(shape), scale.offset.reshape(shape)


def scaled_weight(scale: Scale, *, transposed_groups: int = 0) -> Tensor:
    """``W_eff = f c``: the weight with which the plain layer computes the normalised one, in the layer's shape.

    Args:
        scale: of the site behind the layer.
        transposed_groups: groups of a transposed convolution, 0 for any other layer.
    """
    weight = _filters(scale)
    if scale.factor is None:
        return weight
    ones = [1] * (weight.dim() - 2)
    shape = (transposed_groups, 1, -1, *ones) if transposed_groups else (1, -1, 1, *ones)
    filters: Tensor = weight.unflatten(0, (max(transposed_groups, 1), -1))
    factor = scale.factor.reshape(shape)
    if scale.average is None:
        return (filters * factor).flatten(0, 1)
    return torch.addcmul(-scale.average.reshape(shape) * factor, filters, factor).flatten(0, 1)


def _scaled(function: Callable[..., Tensor], x: Tensor, scale: Scale, rest: tuple[Any, ...]) -> Tensor:
    """A convolution whose outputs are scaled, and centred as if its filters were."""
    weight = _filters(scale)
    dims = weight.dim() - 2
    scaled = affine(function(x, _like(weight, x), None, *rest), scale, -1 - dims)
    if scale.average is None:
        return scaled
    ones = x.new_ones(1, 1, *weight.shape[2:])
    return _centred(scaled, function(x.sum(-1 - dims, keepdim=True), ones, None, *rest), scale, -1 - dims)


def _centred(scaled: Tensor, sums: Tensor, scale: Scale, channel: int) -> Tensor:
    """What centred filters give: less each filter's mean times the sum of all inputs that it sees (ungrouped layers)."""
    assert scale.average is not None
    assert scale.factor is not None
    means = (scale.average * scale.factor).to(scaled.dtype).reshape(-1, *[1] * (-1 - channel))
    return torch.addcmul(scaled, sums, means, value=-1)


def _filters(scale: Scale) -> Tensor:
    assert scale.filters is not None
    return scale.filters


def _on_weight(scale: Scale, outputs: float) -> bool:
    """Whether the weight is multiplied already, or is less to multiply than the outputs."""
    return scale.factor is None or _filters(scale).numel() <= outputs


def _outputs(x: Tensor, channels: int, dims: int, growth: float) -> float:
    """About how many numbers a convolution gives."""
    return x.numel() / x.shape[-1 - dims] * channels * growth


def _product(stride: int | tuple[int, ...], dims: int) -> int:
    return int(stride**dims) if isinstance(stride, int) else math.prod(stride)


def _like(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter in the dtype of half-precision data; sites compute in float32 at least."""
    return parameter.to(x.dtype) if x.dtype in (torch.float16, torch.bfloat16) else parameter
