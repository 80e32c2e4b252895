"""Products of activations: matmul, softmax, scaled-dot-product attention."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.channel_moments import Moments, safe_sqrt
from normprop.errors import NormPropError
from normprop.rules.table import rule


@rule(torch.matmul, operator.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", shaped=True, standing="approximate",
      reason="the factors of a product of two activations are taken as independent")  # fmt: skip
def matmul(
    x: Moments | Tensor, y: Moments | Tensor, *, in_shapes: Sequence[Sequence[int]], out_shape: Sequence[int]
) -> Moments:
    """``z = Σ_k x_k y_k``: ``E = Σ m₁m₂``, ``Var = Σ v₁v₂ + m₁²v₂ + m₂²v₁`` (independent terms, derived)."""
    if isinstance(x, Moments) and isinstance(y, Moments):
        inner = in_shapes[0][-1]
        x = x.expanded((*x.mean.shape[:-1], inner))
        y = y.expanded((*y.mean.shape[:-2], inner, y.mean.shape[-1]))
        var = x.var @ y.var + x.mean.square() @ y.var + x.var @ y.mean.square()
        return Moments(x.mean @ y.mean, var)
    if isinstance(x, Moments) and isinstance(y, Tensor):
        x = x.expanded((*x.mean.shape[:-1], in_shapes[0][-1]))
        return Moments(x.mean @ y, x.var @ y.square())
    if isinstance(y, Moments) and isinstance(x, Tensor):
        y = y.expanded((*y.mean.shape[:-2], in_shapes[0][-2], y.mean.shape[-1]))
        return Moments(x @ y.mean, x.square() @ y.var)
    raise NormPropError("matmul of two constants has no moments.")


@rule(F.scaled_dot_product_attention, shaped=True, standing="approximate",
      reason="attention weights are taken as the softmax of independent Gaussian logits, independent of the values")  # fmt: skip
def attention(
    query: Moments,
    key: Moments,
    value: Moments,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    in_shapes: Sequence[Sequence[int]],
    out_shape: Sequence[int],
) -> Moments:
    """``Σ_k p_k v_k`` with Σp = 1: the mean stays, ``Var = v · E Σp²`` where ``E Σp² ≈ min(1, exp(s²)/n)``.

    s² is the variance of a logit and n the number of keys; log-normal weights (derived).
    """
    width = in_shapes[0][-1]
    factor = scale if scale is not None else 1.0 / math.sqrt(width)
    product = query.expanded((*query.mean.shape[:-1], width)).times(key.expanded((*key.mean.shape[:-1], width)).pooled([-2]))
    logits = product.var.mean(-1, keepdim=True) * (width * factor * factor)
    keys = in_shapes[1][-2]
    concentration = (logits.clamp(max=50.0).exp() / keys).clamp(max=1.0).mean(-2, keepdim=True)
    values = value.pooled([-2])
    return Moments(values.mean, values.var * concentration)


@rule(F.normalize, shaped=True, standing="approximate", reason="the norm of each vector is replaced by its expectation")
def normalize(
    x: Moments,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    *,
    in_shapes: Sequence[Sequence[int]],
    out_shape: Sequence[int],
) -> Moments:
    """``x / ‖x‖₂ ≈ x / √(Σ E x²)`` along one dimension (law of large numbers)."""
    if p != 2.0:
        raise NormPropError(f"normalize with p={p} has no moment rule; only p=2 has.")
    length = x.second.mean(dim, keepdim=True) * in_shapes[0][dim]
    return x.scaled(1.0 / safe_sqrt(length).clamp(min=eps))


def _softmax(x: Moments, dim: int, shape: Sequence[int]) -> Moments:
    count = shape[dim]
    spread = x.var.mean(dim, keepdim=True).clamp(max=50.0)
    mean = (x.mean - x.mean.amax(dim, keepdim=True)).exp()
    mean = mean / (mean.mean(dim, keepdim=True) * count)
    ratio = (spread.exp() - 1.0) * mean
    return Moments(mean, torch.minimum(ratio, 1.0 - mean) * mean)


@rule(F.softmax, torch.softmax, "softmax", shaped=True, standing="approximate",
      reason="log-normal weights whose sum is replaced by its expectation")  # fmt: skip
def softmax(
    x: Moments, dim: int, *_: Any, in_shapes: Sequence[Sequence[int]], out_shape: Sequence[int], **__: Any
) -> Moments:
    """``p_i = e^{u_i} / Σ e^{u_j}``: ``E p ≈ e^{m_i} / Σ e^{m_j}``, ``Var p ≈ min((e^v − 1) E p, 1 − E p) E p`` (derived)."""
    return _softmax(x, dim, in_shapes[0])


@rule(nn.Softmax, shaped=True, standing="approximate", reason="log-normal weights whose sum is replaced by its expectation")
def softmax_module(
    module: nn.Softmax, x: Moments, *, in_shapes: Sequence[Sequence[int]], out_shape: Sequence[int]
) -> Moments:
    """As `softmax`."""
    return _softmax(x, -1 if module.dim is None else module.dim, in_shapes[0])
