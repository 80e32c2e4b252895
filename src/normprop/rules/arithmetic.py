"""Sums, products, gates: arithmetic on tensors, with numbers and parameters."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from normprop.activation_moments import activation_moments
from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.rules.table import rule

Term = Moments | Tensor | float


@rule(torch.add, operator.add, operator.iadd, "add", "add_", "__add__", "__radd__", "__iadd__")
def add(x: Term, y: Term, *, alpha: float = 1) -> Moments:
    """``x + αy``: means add, variances of uncorrelated terms add (METHOD §3); x + x is 2x."""
    if isinstance(x, Moments) and isinstance(y, Moments):
        return x.scaled(1.0 + alpha) if x is y else x.plus(y if alpha == 1 else y.scaled(alpha))
    if isinstance(x, Moments):
        return x.shifted(_constant(y) * alpha)
    return _moments(y).scaled(alpha).shifted(_constant(x))


@rule(torch.sub, operator.sub, operator.isub, "sub", "sub_", "__sub__", "__isub__")
def sub(x: Term, y: Term, *, alpha: float = 1) -> Moments:
    """``x − αy`` of uncorrelated terms."""
    return add(x, y, alpha=-alpha)


@rule(torch.mul, operator.mul, operator.imul, "mul", "mul_", "__mul__", "__rmul__", "__imul__")
def mul(x: Term, y: Term) -> Moments:
    """``x · y``: exact for independent factors, ``v₁v₂ + m₁²v₂ + m₂²v₁`` (a gate); x · x is the square of a Gaussian."""
    if isinstance(x, Moments) and isinstance(y, Moments):
        if x is not y:
            return x.times(y)
        square = activation_moments("square", x.mean, x.std)
        return Moments(square.mean, square.var)
    return x.scaled(_constant(y)) if isinstance(x, Moments) else _moments(y).scaled(_constant(x))


@rule(torch.div, torch.true_divide, operator.truediv, operator.itruediv, "div", "div_", "__truediv__",
      standing="approximate", reason="exact by a constant; a divisor that varies is replaced by its mean")  # fmt: skip
def div(x: Term, y: Term, *, rounding_mode: None = None) -> Moments:
    """``x / y``; for a varying divisor ``x / E y`` with the relative variances added (delta method)."""
    if not isinstance(y, Moments):
        return _moments(x).scaled(1.0 / _constant(y))
    relative = Moments(1.0 / y.mean, y.var / y.mean.square().square())
    return x.times(relative) if isinstance(x, Moments) else relative.scaled(_constant(x))


@rule(torch.neg, operator.neg, "neg", "neg_")
def neg(x: Moments) -> Moments:
    """``−x``."""
    return x.scaled(-1.0)


@rule(torch.pow, operator.pow, "pow", "pow_", "__pow__")
def power(x: Moments, exponent: float) -> Moments:
    """``xⁿ`` of a Gaussian for n = 1, 2."""
    if exponent == 1:
        return x
    if exponent == 2:
        return mul(x, x)
    raise NormPropError(f"a power of {exponent} has no moment rule; 1 and 2 have.")


def _moments(x: Any) -> Moments:
    if not isinstance(x, Moments):
        raise NormPropError(f"arithmetic on {type(x).__name__} alone has no moments.")
    return x


def _constant(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) and not x.is_floating_point() else x
