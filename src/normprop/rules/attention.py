"""Products of activations: matmul, softmax, scaled-dot-product attention."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.rules.arithmetic import add
from normprop.rules.linear import functional_linear
from normprop.rules.pooling import GLOBAL_CORRELATION
from normprop.rules.table import rule, unsupported

Shape = Sequence[int]
Shapes = Sequence[Shape]

_TOKENS = "tokens are taken to correlate by a fixed amount, and attention weights to be independent of the values"


class Shares(Moments):
    """Moments of positive numbers whose sum over the last dimension is 1, until something moves them."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> Moments:  # type: ignore[override]  # no shares any more
        """The same moments in other places."""
        return Moments(self.mean, self.var).moved(move)


def _averages(x: Shares, y: Moments) -> Moments:
    """``Σ_k p_k y_k`` with Σp = 1: ``Var = Σ E p² v + Σ Var p (m − m̄)² + ρ Σ_{k≠l} E p_k E p_l √(v_k v_l)``.

    ρ is the correlation of two tokens; what all means have in common passes unchanged (derived; docs/pooling.md).
    """
    apart = y.mean - y.mean.mean(-2, keepdim=True)
    alone = x.mean.square() @ y.var
    together = ((x.mean @ y.std).square() - alone).clamp(min=0.0)
    return Moments(x.mean @ y.mean, x.var @ (y.var + apart.square()) + alone + GLOBAL_CORRELATION * together)


@rule(torch.matmul, operator.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", shaped=True, standing="approximate",
      reason="the factors of a product of two activations are taken as independent")  # fmt: skip
def matmul(x: Moments | Tensor, y: Moments | Tensor, *, in_shapes: Shapes, out_shape: Shape) -> Moments:
    """``z = Σ_k x_k y_k``: ``E = Σ m₁m₂``, ``Var = Σ v₁v₂ + m₁²v₂ + m₂²v₁`` (independent terms, derived).

    What softmax gave averages tokens, which correlate (see `_averages`).
    """
    if isinstance(x, Moments) and isinstance(y, Moments):
        inner = in_shapes[0][-1]
        x = x.expanded((*x.mean.shape[:-1], inner))
        y = y.expanded((*y.mean.shape[:-2], inner, y.mean.shape[-1]))
        if isinstance(x, Shares):
            return _averages(x, y)
        var = x.var @ y.var + x.mean.square() @ y.var + x.var @ y.mean.square()
        return Moments(x.mean @ y.mean, var)
    if isinstance(x, Moments) and isinstance(y, Tensor):
        x = x.expanded((*x.mean.shape[:-1], in_shapes[0][-1]))
        return Moments(x.mean @ y, x.var @ y.square())
    if isinstance(y, Moments) and isinstance(x, Tensor):
        y = y.expanded((*y.mean.shape[:-2], in_shapes[0][-2], y.mean.shape[-1]))
        return Moments(x @ y.mean, x.square() @ y.var)
    raise NormPropError("matmul of two constants has no moments.")


@rule(torch.addmm, torch.baddbmm, "addmm", "baddbmm", shaped=True, standing="approximate",
      reason="the factors of a product of two activations are taken as independent")  # fmt: skip
def addmm(
    x: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, in_shapes: Shapes, out_shape: Shape
) -> Moments:
    """``β x + α y z`` (see `matmul`)."""
    shapes = in_shapes[isinstance(x, Moments) :]
    constant = not (isinstance(mat1, Moments) or isinstance(mat2, Moments))
    product = mat1 @ mat2 if constant else matmul(mat1, mat2, in_shapes=shapes, out_shape=out_shape)
    scaled = x.scaled(beta) if isinstance(x, Moments) else beta * x
    return add(scaled, product, alpha=alpha)


@rule(torch.einsum, shaped=True, standing="approximate",
      reason="the factors of a product of two activations are taken as independent")  # fmt: skip
def einsum(equation: str, *operands: Any, in_shapes: Shapes, out_shape: Shape) -> Moments:
    """Sums of products of one or two tensors: as `matmul`, ``E = Σ m₁m₂``, ``Var = Σ v₁v₂ + m₁²v₂ + m₂²v₁``."""
    given = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if len(given) > 2:
        raise NormPropError("einsum of more than two tensors has no moment rule; one or two have.")
    result = equation.partition("->")[2].replace(" ", "") if "->" in equation else None
    inputs = equation.partition("->")[0].replace(" ", "").split(",")
    shapes = iter(in_shapes)
    parts = []
    for labels, operand in zip(inputs, given, strict=True):
        if isinstance(operand, Moments):  # what is summed needs its true size
            shape, kept = next(shapes), list(operand.mean.shape)
            for at, label in enumerate(labels.replace("...", "")):
                at = at if "..." not in labels or at < labels.index(".") else at - len(labels.replace("...", ""))
                if result is None or label not in result:
                    kept[at] = shape[at]
            operand = operand.expanded(kept)
        parts.append(operand if isinstance(operand, Moments) else Moments(operand, torch.zeros_like(operand)))
    if len(parts) == 1:
        return Moments(torch.einsum(equation, parts[0].mean), torch.einsum(equation, parts[0].var))
    x, y = parts
    var = torch.einsum(equation, x.second, y.second)
    squares = torch.einsum(equation, x.mean.square(), y.mean.square())
    return Moments(torch.einsum(equation, x.mean, y.mean), var - squares)


@rule(F.scaled_dot_product_attention, shaped=True, standing="approximate",
      reason=_TOKENS)  # fmt: skip
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
    in_shapes: Shapes,
    out_shape: Shape,
) -> Moments:
    """``Σ_k p_k v_k`` with Σp = 1: the mean stays, ``Var = v (ρ + (1−ρ) c)``, ``c = E Σp² ≈ min(1, exp((1−ρ) s²)/n)``.

    ρ is the correlation of two tokens, as of two positions that an average is taken of; s² is the variance of a logit, of
    which keys share the part ρ, and n their number; log-normal weights (derived; docs/pooling.md has what was measured).
    """
    width = in_shapes[0][-1]
    factor = scale if scale is not None else 1.0 / math.sqrt(width)
    product = query.expanded((*query.mean.shape[:-1], width)).times(key.expanded((*key.mean.shape[:-1], width)).pooled([-2]))
    logits = product.var.mean(-1, keepdim=True) * (width * factor * factor)
    keys = in_shapes[1][-2]
    apart = 1.0 - GLOBAL_CORRELATION
    concentration = ((apart * logits).clamp(max=50.0).exp() / keys).clamp(max=1.0).mean(-2, keepdim=True)
    values = value.pooled([-2])
    return Moments(values.mean, values.var * (GLOBAL_CORRELATION + apart * concentration))


@rule(nn.MultiheadAttention, shaped=True, standing="approximate",
      reason="as scaled_dot_product_attention; positions share one distribution")  # fmt: skip
def multihead_attention(
    module: nn.MultiheadAttention, query: Moments, key: Moments, value: Moments, *_: Any, in_shapes: Shapes,
    out_shape: Shape | None, **__: Any,
) -> tuple[Moments, None]:  # fmt: skip
    """Projections, `attention` in each head, output projection; the weights it also returns have no moments here."""
    if module.in_proj_weight is not None:
        weights: Any = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    rank, heads, width = len(in_shapes[0]), module.num_heads, module.head_dim
    parts = []
    for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
        projected = functional_linear(x.pooled(range(rank - 1)), weight, bias)
        parts.append(Moments(*(t.reshape(1, heads, 1, width) for t in (projected.mean, projected.var))))
    keys = in_shapes[1][1 if module.batch_first and rank == 3 else 0]
    mixed = attention(parts[0], parts[1], parts[2], in_shapes=((1, heads, keys, width),) * 3, out_shape=())
    joined = Moments(*(t.reshape((1,) * (rank - 1) + (heads * width,)) for t in (mixed.mean, mixed.var)))
    return functional_linear(joined, module.out_proj.weight, module.out_proj.bias), None


def _softmax(x: Moments, dim: int, shape: Sequence[int]) -> Moments:
    count = shape[dim]
    spread = x.var.mean(dim, keepdim=True).clamp(max=50.0)
    mean = (x.mean - x.mean.amax(dim, keepdim=True)).exp()
    mean = mean / (mean.mean(dim, keepdim=True) * count)
    ratio = (spread.exp() - 1.0) * mean
    kind = Shares if dim % len(shape) == len(shape) - 1 else Moments
    return kind(mean, torch.minimum(ratio, 1.0 - mean) * mean)


@rule(F.softmax, torch.softmax, "softmax", shaped=True, standing="approximate",
      reason="log-normal weights whose sum is replaced by its expectation")  # fmt: skip
def softmax(x: Moments, dim: int, *_: Any, in_shapes: Shapes, out_shape: Shape, **__: Any) -> Moments:
    """``e^{u_i} / Σ e^{u_j}``: ``E p ≈ e^{m_i} / Σ e^{m_j}``, ``Var p ≈ min((e^v − 1) E p, 1 − E p) E p`` (derived)."""
    return _softmax(x, dim, in_shapes[0])


@rule(nn.Softmax, nn.Softmax2d, shaped=True, standing="approximate",
      reason="log-normal weights whose sum is replaced by its expectation")  # fmt: skip
def softmax_module(module: nn.Softmax | nn.Softmax2d, x: Moments, *, in_shapes: Shapes, out_shape: Shape) -> Moments:
    """As `softmax`; Softmax2d's runs over the channels."""
    dim = -3 if isinstance(module, nn.Softmax2d) else module.dim
    return _softmax(x, -1 if dim is None else dim, in_shapes[0])


@rule(F.log_softmax, torch.log_softmax, "log_softmax", shaped=True, standing="approximate",
      reason="the sum of exponentials is replaced by its expectation")  # fmt: skip
def log_softmax(x: Moments, dim: int, *_: Any, in_shapes: Shapes, out_shape: Shape, **__: Any) -> Moments:
    """``u_i − log Σ e^{u_j}`` with ``E Σ e^u = Σ e^{m + v/2}``: the variance stays (derived)."""
    exponent = x.mean + 0.5 * x.var
    count = in_shapes[0][dim] // exponent.shape[dim]
    return x.shifted(-exponent.logsumexp(dim, keepdim=True) - math.log(count))


@rule(nn.LogSoftmax, shaped=True, standing="approximate", reason="the sum of exponentials is replaced by its expectation")
def log_softmax_module(module: nn.LogSoftmax, x: Moments, *, in_shapes: Shapes, out_shape: Shape) -> Moments:
    """As `log_softmax`."""
    return log_softmax(x, -1 if module.dim is None else module.dim, in_shapes=in_shapes, out_shape=out_shape)


unsupported(nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell,
            reason="a recurrence changes its moments at every step; normprop.nn has recurrent layers for it")  # fmt: skip
unsupported(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder,
            nn.Transformer,
            reason="torch fuses these; write the block with nn.MultiheadAttention and nn.LayerNorm")  # fmt: skip
