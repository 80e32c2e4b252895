"""Normalisers: BatchNorm, whose place a site takes, and those that measure each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.channel_moments import Moments, safe_sqrt
from normprop.rules.table import rule

Shape = Sequence[int]

_MEASURED = "statistics measured on each sample are replaced by their expectation"


def affine_moments(weight: Tensor | None, bias: Tensor | None, like: Tensor, dim: int = 1) -> Moments:
    """N(β, γ²): what a normaliser's γ û + β has for û of mean 0 and variance 1, with the channels along `dim`."""
    shape = [1] * like.dim()
    shape[dim] = -1
    channels = like.shape[dim]
    ones = like.new_ones(channels) if weight is None else weight.to(like.dtype)
    zeros = like.new_zeros(channels) if bias is None else bias.to(like.dtype)
    return Moments(zeros.reshape(shape), ones.square().reshape(shape))


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm(module: nn.BatchNorm2d, x: Moments) -> Moments:
    """``γ û + β`` with E û = 0, Var û = 1: what the normalisation is there for (Arpit et al., 2016, §3).

    With running statistics this says that they describe the data.
    """
    like = x.mean.expand(*x.mean.shape[:1], module.num_features, *x.mean.shape[2:])
    return affine_moments(module.weight, module.bias, like)


@rule(torch.batch_norm)
def torch_batch_norm(x: Moments, weight: Tensor | None, bias: Tensor | None, *_: Any, **__: Any) -> Moments:
    """As `batch_norm`, in the order of torch's own function."""
    return affine_moments(weight, bias, x.mean)


@rule(F.batch_norm)
def functional_batch_norm(
    x: Moments, running_mean: Any, running_var: Any, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any,
    **__: Any,
) -> Moments:  # fmt: skip
    """As `batch_norm`."""
    return affine_moments(weight, bias, x.mean)


@rule("torchvision.ops.misc.FrozenBatchNorm2d", "timm.layers.norm_act.FrozenBatchNormAct2d")
def frozen_batch_norm(module: nn.Module, x: Moments) -> Moments:
    """``γ (x − rm)/√(rv + ε) + β`` with constants: an affine map, exact."""
    weight, bias, mean, var = (
        torch.as_tensor(getattr(module, k)).reshape(1, -1, *(1,) * (x.mean.dim() - 2))
        for k in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight * (var + float(module.eps)).rsqrt()  # type: ignore[arg-type]  # an attribute of a foreign module
    return x.scaled(scale).shifted(bias - mean * scale)


def _normalised(x: Moments, dims: Sequence[int], shape: Shape, eps: float, *, centred: bool = True) -> Moments:
    """``(x − x̄)/s`` with the sample's own x̄ and s over `dims` replaced by their expectation.

    A channel that varies around its own mean m_c inside a group of mean m̄ keeps the offset m_c − m̄; the group's variance
    is the mean variance plus the variance of the means (law of total variance).
    """
    full = [shape[d] if d in dims and x.mean.shape[d] != 1 else x.mean.shape[d] for d in range(len(shape))]
    x = x.expanded(full)
    if not centred:
        second = x.second.mean(list(dims), keepdim=True)
        return x.scaled(1.0 / safe_sqrt(second + eps))
    group = x.pooled(list(dims))
    return x.shifted(-group.mean).scaled(1.0 / safe_sqrt(group.var + eps))


def _affine(x: Moments, weight: Tensor | None, bias: Tensor | None) -> Moments:
    if weight is not None:
        x = x.scaled(weight)
    return x if bias is None else x.shifted(bias)


@rule(F.layer_norm, torch.layer_norm, shaped=True, standing="approximate", reason=_MEASURED)
def functional_layer_norm(
    x: Moments, normalized_shape: Shape, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    in_shapes: Sequence[Shape], out_shape: Shape,
) -> Moments:  # fmt: skip
    """See `_normalised`, over the last dimensions."""
    rank = len(in_shapes[0])
    dims = range(rank - len(normalized_shape), rank)
    return _affine(_normalised(x, dims, in_shapes[0], eps), weight, bias)


@rule(nn.LayerNorm, shaped=True, standing="approximate", reason=_MEASURED)
def layer_norm(module: nn.LayerNorm, x: Moments, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """As `functional_layer_norm`."""
    return functional_layer_norm(
        x, module.normalized_shape, module.weight, module.bias, module.eps, in_shapes=in_shapes, out_shape=out_shape
    )


@rule(F.rms_norm, torch.rms_norm, shaped=True, standing="approximate", reason=_MEASURED)
def functional_rms_norm(
    x: Moments, normalized_shape: Shape, weight: Tensor | None = None, eps: float | None = None, *,
    in_shapes: Sequence[Shape], out_shape: Shape,
) -> Moments:  # fmt: skip
    """``w x / √(E x²)`` over the last dimensions."""
    rank = len(in_shapes[0])
    dims = range(rank - len(normalized_shape), rank)
    eps = torch.finfo(x.mean.dtype).eps if eps is None else eps
    return _affine(_normalised(x, dims, in_shapes[0], eps, centred=False), weight, None)


@rule(nn.RMSNorm, shaped=True, standing="approximate", reason=_MEASURED)
def rms_norm(module: nn.RMSNorm, x: Moments, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """As `functional_rms_norm`."""
    return functional_rms_norm(
        x, module.normalized_shape, module.weight, module.eps, in_shapes=in_shapes, out_shape=out_shape
    )


def _grouped(x: Moments, groups: int, shape: Shape, eps: float) -> Moments:
    channels = shape[1]
    spread = x.expanded([channels if d == 1 else s for d, s in enumerate(x.mean.shape)])
    parts = Moments(*(t.unflatten(1, (groups, channels // groups)) for t in (spread.mean, spread.var)))
    rest = list(range(2, parts.mean.dim()))
    normal = _normalised(parts, rest, (shape[0], groups, channels // groups, *parts.mean.shape[3:]), eps)
    return Moments(normal.mean.flatten(1, 2), normal.var.flatten(1, 2))


@rule(nn.GroupNorm, shaped=True, standing="approximate", reason=_MEASURED)
def group_norm(module: nn.GroupNorm, x: Moments, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """See `_normalised`, over the channels of a group and all positions."""
    shape = [-1 if d == 1 else 1 for d in range(len(in_shapes[0]))]
    weight, bias = (None if p is None else p.reshape(shape) for p in (module.weight, module.bias))
    return _affine(_grouped(x, module.num_groups, in_shapes[0], module.eps), weight, bias)


@rule(F.group_norm, torch.group_norm, shaped=True, standing="approximate", reason=_MEASURED)
def functional_group_norm(
    x: Moments, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    in_shapes: Sequence[Shape], out_shape: Shape,
) -> Moments:  # fmt: skip
    """As `group_norm`."""
    shape = [-1 if d == 1 else 1 for d in range(len(in_shapes[0]))]
    weight, bias = (None if p is None else p.reshape(shape) for p in (weight, bias))
    return _affine(_grouped(x, num_groups, in_shapes[0], eps), weight, bias)


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, shaped=True, standing="approximate", reason=_MEASURED)
def instance_norm(module: nn.InstanceNorm2d, x: Moments, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """As `group_norm` with one channel a group: mean 0, variance 1, then the affine map."""
    shape = [-1 if d == 1 else 1 for d in range(len(in_shapes[0]))]
    weight, bias = (None if p is None else p.reshape(shape) for p in (module.weight, module.bias))
    return _affine(_grouped(x, in_shapes[0][1], in_shapes[0], module.eps), weight, bias)


@rule(F.instance_norm, shaped=True, standing="approximate", reason=_MEASURED)
def functional_instance_norm(
    x: Moments, running_mean: Any = None, running_var: Any = None, weight: Tensor | None = None, bias: Tensor | None = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, *_: Any, in_shapes: Sequence[Shape],
    out_shape: Shape,
) -> Moments:  # fmt: skip
    """As `instance_norm`."""
    channels = in_shapes[0][1]
    return functional_group_norm(x, channels, weight, bias, eps, in_shapes=in_shapes, out_shape=out_shape)


_ENERGY = "the local energy is replaced by its expectation"


@rule(nn.LocalResponseNorm, standing="approximate", reason=_ENERGY)
def local_response_norm(module: nn.LocalResponseNorm, x: Moments) -> Moments:
    """As `functional_local_response_norm`."""
    return functional_local_response_norm(x, module.size, module.alpha, module.beta, module.k)


@rule(F.local_response_norm, standing="approximate", reason=_ENERGY)
def functional_local_response_norm(
    x: Moments, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Moments:
    """``x / (k + α · mean of x² over n neighbouring channels)^β``; borders have fewer neighbours."""
    second = x.second
    if second.shape[1] > 1:  # the channel dimension last, where the pooling works
        rows = F.pad(second.movedim(1, -1).flatten(0, -2).unsqueeze(1), (size // 2, (size - 1) // 2))
        second = F.avg_pool1d(rows, size, stride=1).reshape(second.movedim(1, -1).shape).movedim(-1, 1)
    return x.scaled((k + alpha * second).pow(-beta))
