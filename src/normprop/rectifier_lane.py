"""Mean and variance behind a leaky rectifier in one autograd function: the activation that moment lanes run most."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

_ROOT_TWO_PI = 2.5066282746310002
_FAR = 40.0  # standard deviations beyond which Φ is 0 or 1 in float64


class _Normal(NamedTuple):
    """What moments and derivatives are made of: σ, t = m/σ, Φ(t), φ(t), E relu(u)."""

    std: Tensor
    t: Tensor
    cdf: Tensor
    pdf: Tensor
    positive: Tensor


class LeakyRectifierMoments(torch.autograd.Function):
    """E f and Var f for u ~ N(m, v) and f(u) = max(u, 0) + a min(u, 0), with the derivatives written out.

    With t = m/√v, h = E relu(u) = mΦ(t) + √v φ(t) ([P] remark 1 at any m and v):

        E f   = (1−a) h + a m
        Var f = (1−a)² Var relu + 2a(1−a) v Φ + a² v                     as Cov(u, relu(u)) = v Φ
        Var relu = (m² + v)Φ + m√v φ − h²  for t ≤ 0; v(1 − 2Φ(−t)) + Var relu(−u) for t > 0, where that would cancel

        ∂E/∂m = (1−a)Φ + a            ∂Var/∂m = (1−a)² 2h(1−Φ) + 2a(1−a) √v φ
        ∂E/∂v = (1−a) φ/(2√v)         ∂Var/∂v = (1−a)² (Φ − hφ/√v) + 2a(1−a)(Φ − tφ/2) + a²

    (derived). Where v = 0 the derivative that would be infinite is 0. `activation_moments` gives the same values, and the
    slopes besides, from the general engine for piecewise polynomials.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, var: Tensor, slope: float) -> tuple[Tensor, Tensor]:
        """Mean and variance, in the inputs' shape and dtype."""
        m, v = _wide(mean), _wide(var)
        z = _normal(m, v)
        # The tail is computed on the side where relu(u) is mostly zero, and mirrored.
        tail = torch.special.ndtr(-z.t.abs())
        low = z.std * z.pdf - m.abs() * tail
        rest = (m.square() + v) * tail - m.abs() * z.std * z.pdf - low.square()
        rectified = torch.where(z.t > 0, v * (1.0 - 2.0 * tail) + rest, rest).clamp(min=0.0)
        first = (1.0 - slope) * z.positive + slope * m
        second = (1.0 - slope) ** 2 * rectified + v * (2.0 * slope * (1.0 - slope) * z.cdf + slope**2)
        return first.to(mean.dtype), second.to(mean.dtype)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004  torch's signature
        """Keep the inputs: all else is cheap."""
        mean, var, slope = inputs
        ctx.save_for_backward(mean, var)
        ctx.slope = slope  # type: ignore[attr-defined]  # a context takes any attribute

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """See the class."""
        mean, var = ctx.saved_tensors
        a, b = ctx.slope, 1.0 - ctx.slope
        z = _normal(_wide(mean), _wide(var))
        ratio = torch.where(var > 0, z.pdf / torch.where(var > 0, z.std, 1.0), 0.0)
        by_mean = grads[0] * (b * z.cdf + a) + grads[1] * (
            2.0 * b * b * z.positive * (1.0 - z.cdf) + 2.0 * a * b * z.std * z.pdf
        )
        by_var = grads[0] * (0.5 * b * ratio) + grads[1] * (
            b * b * (z.cdf - z.positive * ratio) + 2.0 * a * b * (z.cdf - 0.5 * z.t * z.pdf) + a * a
        )
        return by_mean.to(mean.dtype), by_var.to(var.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()  # Metal has no float64


def _normal(mean: Tensor, var: Tensor) -> _Normal:
    known = var > 0
    std = torch.where(known, torch.where(known, var, 1.0).sqrt(), 0.0)
    t = torch.where(known, mean / torch.where(known, std, 1.0), _FAR * mean.sign())
    cdf = torch.special.ndtr(t)
    pdf = torch.exp(-0.5 * t.square()) / _ROOT_TWO_PI
    return _Normal(std, t, cdf, pdf, mean * cdf + std * pdf)
