"""Moments of a Gaussian that hardly varies, whose derivatives are those of the limit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


_EXACT = torch.finfo(torch.float64).eps


def smallest_std(mean: Tensor, center: Tensor, *, kinked: bool, rounding: float = _EXACT) -> Tensor:
    """The std below which moments are continued towards std = 0, for a function with the value `center` at the mean.

    Derivatives are sums of f(u) times derivatives of the density, so their rounding error is ε|f|/s; what the limit leaves
    out grows with s² where f is smooth, and with s beside a kink.
    """
    power = 0.4 if kinked else 1 / 3
    return (0.1 + mean.abs() + center.abs()).detach() * float(rounding**power)


def continued(
    evaluate: Evaluate,
    mean: Tensor,
    var: Tensor,
    center: Tensor,
    *,
    kinked: bool,
    jumping: bool = False,
    rounding: float = _EXACT,
) -> tuple[Tensor, Tensor]:
    """E f and Var f for u ~ N(mean, var), also without variance (derived).

    Below the smallest std s₀ it is ``f(m) + (E f − f(m)) r`` and ``Var f · v/s₀²`` with E f and Var f at s₀: as
    ``E f − f(m) = ½ f″(m) v + …`` and ``Var f = f′(m)² v + …``, with r = v/s₀². At a kink E f − f(m) is proportional to
    the std, so there r is √(v/s₀²), with the derivative 0 at v = 0. The derivative by the mean at v = 0 is f′(m): at a kink
    the mean of both slopes, at a jump what autograd says of f.

    Args:
        evaluate: mean and std → E f and Var f.
        mean: float tensor, any shape.
        var: of the same shape, not negative.
        center: f(mean), of the same shape.
        kinked: whether f may have a kink or a jump anywhere.
        jumping: whether it may have a jump.
        rounding: of the arithmetic in `evaluate`.
    """
    fixed = center.detach()
    least = smallest_std(mean.detach(), fixed, kinked=kinked, rounding=rounding).square()
    narrow = var < least
    first, second = evaluate(mean, torch.where(narrow, least, var).sqrt())
    share = torch.where(narrow, var / least, 1.0)
    alike = share
    if kinked:
        known = share > 0
        alike = torch.where(known, torch.where(known, share, 1.0).sqrt(), 0.0)
    first = first - (1.0 - alike) * (first - fixed).detach()
    return torch.where(var > 0, first, center) if jumping else first, second * share
