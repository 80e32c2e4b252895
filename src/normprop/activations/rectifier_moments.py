"""Mean and variance behind a leaky rectifier in one autograd function: the activation that moment lanes run most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from normprop.activations.normal import tail_ratios
from normprop.precision import working_dtype

_ROOT_TWO_PI = 2.5066282746310002
_ROOT_HALF = 0.7071067811865476


def rectified_moments(mean: Tensor, var: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """E f and Var f for u ~ N(mean, var) and f(u) = max(u, 0) + slope · min(u, 0); see `LeakyRectifierMoments`."""
    tracing = torch._C._get_tracing_state() is not None  # torch.jit.trace can't save functions of autograd
    evaluate = LeakyRectifierMoments.forward if tracing else LeakyRectifierMoments.apply
    first, second, *_ = evaluate(mean, var, slope)
    return first, second


class LeakyRectifierMoments(torch.autograd.Function):
    """E f and Var f for u ~ N(m, v) and f(u) = max(u, 0) + a min(u, 0), with the derivatives written out.

    With t = m/√v, h = E relu(u) = mΦ(t) + √v φ(t) (Arpit et al., 2016, remark 1, at any m and v) and h̄ = E relu(−u) = h − m:

        E f   = (1−a) h + a m
        Var f = (1−a)² Var relu + 2a(1−a) v Φ + a² v                     as Cov(u, relu(u)) = v Φ
        Var relu = v Φ − h h̄                                             as E relu² = m h + v Φ
                 = √v h r − h²  for m < 0, r = I_2(|t|)/I_1(|t|)          as E relu² = v I_2(−t) there

        ∂E/∂m = (1−a)Φ + a            ∂Var/∂m = (1−a)² 2h(1−Φ) + 2a(1−a) √v φ
        ∂E/∂v = (1−a) φ/(2√v)         ∂Var/∂v = (1−a)² (Φ − hφ/√v) + 2a(1−a)(Φ − tφ/2) + a²

    (derived; I_n and r as in `tail_moments`). Of h and h̄ the one beyond the mean's side is √v Φ(−|t|)/(|t| + r), and
    |m| is added for the other, so that nothing cancels, however far the mean is from zero. Where v = 0 the derivative
    that would be infinite is 0. `activation_moments` gives the same values, and the slopes besides, from the general
    engine for piecewise polynomials. Beside the two moments, Φ, h and φ/√v are returned, for the backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, var: Tensor, slope: float) -> tuple[Tensor, ...]:
        """Mean and variance in the inputs' shape and dtype; Φ, h and φ/√v in float64."""
        m, v = _wide(mean), _wide(var)
        cdf, positive, ratio, rectified = _rectified(m, v)
        if slope:
            first = (1.0 - slope) * positive + slope * m
            second = (1.0 - slope) ** 2 * rectified + v * (2.0 * slope * (1.0 - slope) * cdf + slope**2)
        else:
            first, second = positive.clone(), rectified
        return first.to(mean.dtype), second.to(mean.dtype), cdf, positive, ratio

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs and what the backward needs."""
        mean, var, slope = inputs
        ctx.save_for_backward(mean, var, *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.slope = slope  # type: ignore[attr-defined]  # a context takes any attribute

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """See the class."""
        mean, var, cdf, positive, ratio = ctx.saved_tensors
        a, b = ctx.slope, 1.0 - ctx.slope
        if torch.is_grad_enabled():  # to be differentiated again: as functions of mean and variance
            cdf, positive, ratio = _differentiable(_wide(mean), _wide(var))
        by_mean, by_var = 2.0 * positive * (1.0 - cdf), cdf - positive * ratio
        if a:
            by_mean = b * b * by_mean + (2.0 * a * b) * ratio * var
            by_var = b * b * by_var + 2.0 * a * b * (cdf - 0.5 * ratio * mean) + a * a
        by_mean = grads[1] * by_mean + grads[0] * (b * cdf + a)
        by_var = grads[1] * by_var + grads[0] * (0.5 * b * ratio)
        return by_mean.to(mean.dtype), by_var.to(var.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x.to(working_dtype(x.device))


def _rectified(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Φ(t), E relu(u), φ(t)/√v and Var relu(u)."""
    known = var > 0
    std = torch.where(known, var, torch.finfo(var.dtype).tiny).sqrt()
    distance = mean.abs()
    t = distance / std
    pdf = torch.exp(-0.5 * t.square()) / _ROOT_TWO_PI
    mills, ratio = tail_ratios(t)
    tail = pdf * mills
    beyond = tail / (t + ratio)
    low = std * beyond
    high = low + distance
    above = mean > 0
    cdf = torch.where(above, 1.0 - tail, tail)
    rectified = torch.where(above, var * cdf - low * high, var * (beyond * (ratio - beyond)))
    return cdf, torch.where(above, high, low), torch.where(known, pdf / std, 0.0), rectified


def _differentiable(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first three in operations that are smooth in the mean, at the cost of digits far below zero."""
    known = var > 0
    std = torch.where(known, torch.where(known, var, 1.0).sqrt(), torch.finfo(var.dtype).tiny)
    t = mean / std
    cdf = 0.5 * torch.erfc(-t * _ROOT_HALF)  # ndtr is 0 far below zero
    pdf = torch.where(known, torch.exp(-0.5 * torch.where(known, t, 0.0).square()) / _ROOT_TWO_PI, 0.0)
    return cdf, mean * cdf + std * pdf, pdf / std
