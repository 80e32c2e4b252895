"""Sums, products, gates: arithmetic on tensors, with numbers and parameters."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.rules.table import Standing, rule

Term = Moments | Tensor | float

_DELTA = "expanded around a positive mean; a Gaussian has no such moment"
_POSITIVE = 1e-6


@rule(torch.add, operator.add, "add", "add_")
def add(x: Term, other: Term, *, alpha: float = 1) -> Moments:
    """``x + αy``: means add, variances of uncorrelated terms add (derived); x + x is 2x."""
    if isinstance(x, Moments) and isinstance(other, Moments):
        return x.scaled(1.0 + alpha) if x is other else x.plus(other if alpha == 1 else other.scaled(alpha))
    if isinstance(x, Moments):
        return x.shifted(_constant(other) * alpha)
    return _moments(other).scaled(alpha).shifted(_constant(x))


@rule(torch.sub, torch.subtract, operator.sub, "sub", "sub_", "subtract")
def sub(x: Term, other: Term, *, alpha: float = 1) -> Moments:
    """``x − αy`` of uncorrelated terms."""
    return add(x, other, alpha=-alpha)


@rule(torch.rsub)
def rsub(x: Term, other: Term, *, alpha: float = 1) -> Moments:
    """``y − αx`` of uncorrelated terms."""
    return add(other, x, alpha=-alpha)


@rule(torch.mul, torch.multiply, operator.mul, "mul", "mul_", "multiply")
def mul(x: Term, other: Term) -> Moments:
    """``x · y``: exact for independent factors, ``v₁v₂ + m₁²v₂ + m₂²v₁`` (a gate); x · x is the square of a Gaussian."""
    if isinstance(x, Moments) and isinstance(other, Moments):
        if x is not other:
            return x.times(other)
        return Moments(x.second, 2.0 * x.var.square() + 4.0 * x.mean.square() * x.var)
    return x.scaled(_constant(other)) if isinstance(x, Moments) else _moments(other).scaled(_constant(x))


def _by_a_constant(x: Any, other: Any, **_: Any) -> tuple[Standing, str] | None:
    return ("exact", "") if other is not Moments else None


@rule(operator.floordiv, torch.floor_divide, "floor_divide", standing="approximate",
      reason="what is cut off is taken to be even between 0 and 1")  # fmt: skip
def floordiv(x: Moments, other: float) -> Moments:
    """``⌊x/c⌋``, of lengths as a rule: ``E ≈ m/c − ½``, ``Var ≈ v/c² + 1/12`` (rounding that depends on nothing)."""
    quotient = x.scaled(1.0 / other).shifted(-0.5)
    return Moments(quotient.mean, quotient.var + 1.0 / 12.0)


@rule(torch.div, torch.true_divide, torch.divide, operator.truediv, "div", "div_", "divide",
      standing="approximate", reason="a divisor that varies is replaced by its mean", judge=_by_a_constant)  # fmt: skip
def div(x: Term, other: Term, *, rounding_mode: None = None) -> Moments:
    """``x / y``; for a varying divisor ``x / E y`` with the relative variances added (delta method)."""
    if not isinstance(other, Moments):
        return _moments(x).scaled(1.0 / _constant(other))
    relative = Moments(1.0 / other.mean, other.var / other.mean.pow(4))
    return x.times(relative) if isinstance(x, Moments) else relative.scaled(_constant(x))


@rule(torch.neg, torch.negative, operator.neg, "neg", "neg_", "negative")
def neg(x: Moments) -> Moments:
    """``−x``."""
    return x.scaled(-1.0)


@rule(torch.addcmul, "addcmul", "addcmul_")
def addcmul(x: Term, tensor1: Term, tensor2: Term, *, value: float = 1) -> Moments:
    """``x + α y z`` of independent terms."""
    if isinstance(tensor1, Moments) or isinstance(tensor2, Moments):
        return add(x, mul(tensor1, tensor2), alpha=value)
    return add(x, tensor1 * tensor2, alpha=value)


def _constant_weight(x: Any, end: Any, weight: Any) -> tuple[Standing, str] | None:
    return ("unsupported", "its weight depends on the input") if weight is Moments else None


@rule(torch.lerp, "lerp", "lerp_", judge=_constant_weight)
def lerp(x: Term, end: Term, weight: Tensor | float) -> Moments:
    """``(1 − w) x + w y`` with a constant w."""
    first = mul(x, 1.0 - weight) if isinstance(x, Moments) else x * (1.0 - weight)
    return add(first, mul(end, weight) if isinstance(end, Moments) else end * weight)


@rule(torch.maximum, "maximum")
def maximum(x: Moments, other: Term) -> Moments:
    """Larger of two independent Gaussians, ``s² = v₁ + v₂``, ``a = (m₁ − m₂)/s`` (Clark 1961).

    ``E = m₁Φ(a) + m₂Φ(−a) + sφ(a)`` and ``E max² = (v₁+m₁²)Φ(a) + (v₂+m₂²)Φ(−a) + (m₁+m₂)sφ(a)``.
    """
    y = other if isinstance(other, Moments) else Moments(_like(other, x), torch.zeros_like(x.mean))
    spread = (x.var + y.var).clamp(min=torch.finfo(x.var.dtype).tiny).sqrt()
    a = (x.mean - y.mean) / spread
    density = torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
    above, below = torch.special.ndtr(a), torch.special.ndtr(-a)
    mean = x.mean * above + y.mean * below + spread * density
    second = x.second * above + y.second * below + (x.mean + y.mean) * spread * density
    return Moments(mean, (second - mean.square()).clamp(min=0.0))


@rule(torch.minimum, "minimum")
def minimum(x: Moments, other: Term) -> Moments:
    """``min(x, y) = −max(−x, −y)``."""
    return neg(maximum(neg(x), neg(other) if isinstance(other, Moments) else -other))


def _small_power(x: Any, exponent: Any) -> tuple[Standing, str] | None:
    if exponent is Moments or x is not Moments or not isinstance(exponent, int | float):
        return "unsupported", "a power of a number, or to an exponent that is a tensor, has no moments by itself"
    return ("exact", "") if exponent in (1, 2, 3) else None


@rule(torch.pow, operator.pow, "pow", "pow_", standing="approximate",
      reason="expanded around the mean, but for the powers 1, 2 and 3", judge=_small_power)  # fmt: skip
def power(x: Moments, exponent: float) -> Moments:
    """``xⁿ`` of a Gaussian: Isserlis for n = 2, 3, otherwise ``f(m)`` and ``f′(m)² v`` for positive x (delta method)."""
    if exponent == 1:
        return x
    if exponent == 2:
        return mul(x, x)
    if exponent == 3:
        mean = x.mean.pow(3) + 3 * x.mean * x.var
        return Moments(mean, 9 * x.mean.pow(4) * x.var + 36 * x.mean.square() * x.var.square() + 15 * x.var.pow(3))
    return expanded_at_mean(x, lambda m: m.pow(exponent), lambda m: exponent * m.pow(exponent - 1))


@rule(torch.sqrt, "sqrt", "sqrt_", standing="approximate", reason=_DELTA)
def sqrt(x: Moments) -> Moments:
    """See `expanded_at_mean`."""
    return expanded_at_mean(x, torch.sqrt, lambda m: 0.5 * m.rsqrt())


@rule(torch.rsqrt, "rsqrt", "rsqrt_", standing="approximate", reason=_DELTA)
def rsqrt(x: Moments) -> Moments:
    """See `expanded_at_mean`."""
    return expanded_at_mean(x, torch.rsqrt, lambda m: -0.5 * m.rsqrt().pow(3))


@rule(torch.reciprocal, "reciprocal", "reciprocal_", standing="approximate", reason=_DELTA)
def reciprocal(x: Moments) -> Moments:
    """See `expanded_at_mean`."""
    return expanded_at_mean(x, torch.reciprocal, lambda m: -m.pow(-2))


@rule(torch.log, "log", "log_", standing="approximate", reason=_DELTA)
def log(x: Moments) -> Moments:
    """See `expanded_at_mean`."""
    return expanded_at_mean(x, torch.log, torch.reciprocal)


@rule(torch.log1p, "log1p", torch.special.log1p, standing="approximate", reason=_DELTA)
def log1p(x: Moments) -> Moments:
    """See `expanded_at_mean`, at 1 + x."""
    return log(x.shifted(1.0))


def expanded_at_mean(x: Moments, f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Moments:
    """``E f(x) ≈ f(m)`` and ``Var f(x) ≈ f′(m)² v`` for a positive x (delta method)."""
    mean = x.mean.clamp(min=_POSITIVE)
    return Moments(f(mean), slope(mean).square() * x.var)


def _like(value: Any, x: Moments) -> Tensor:
    return value.to(x.mean.dtype) if isinstance(value, Tensor) else torch.full_like(x.mean, value)


def _moments(x: Any) -> Moments:
    if not isinstance(x, Moments):
        raise NormPropError(f"arithmetic on {type(x).__name__} alone has no moments.")
    return x


def _constant(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) and not x.is_floating_point() else x
