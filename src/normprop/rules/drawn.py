"""Numbers drawn at random within a forward: noise, and what masks of dropout are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.precision import accumulation_dtype
from normprop.rules.table import rule
from normprop.rules.uniform import Uniform

Shape = Sequence[int]


@rule(torch.rand, torch.rand_like, shaped=True)
def rand(*_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **options: Any) -> Uniform:
    """Evenly from [0, 1): mean 1/2, variance 1/12."""
    return Uniform(*_constants(out_shape, options, 1 / 2, 1 / 12))


@rule(torch.randn, torch.randn_like, shaped=True)
def randn(*_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **options: Any) -> Moments:
    """Standard normal."""
    return Moments(*_constants(out_shape, options, 0.0, 1.0))


@rule(torch.randint, torch.randint_like, "random_", shaped=True)
def randint(*numbers: Any, in_shapes: Sequence[Shape], out_shape: Shape, **options: Any) -> Moments:
    """Integers from [a, b): mean (a + b − 1)/2, variance ((b − a)² − 1)/12."""
    bounds = [n for n in numbers if isinstance(n, int)]
    bounds = bounds or [options[name] for name in ("low", "high", "from", "to") if isinstance(options.get(name), int)]
    if not bounds:
        raise NormPropError("integers of the whole range of a dtype have no moment rule; give random_ its bounds.")
    low, high = (0, bounds[0]) if len(bounds) == 1 else bounds
    return Moments(*_constants(out_shape, options, (low + high - 1) / 2, ((high - low) ** 2 - 1) / 12))


@rule("uniform_", shaped=True)
def uniform(low: float = 0.0, high: float = 1.0, *, in_shapes: Sequence[Shape], out_shape: Shape, **options: Any) -> Uniform:
    """Evenly from [a, b): mean (a + b)/2, variance (b − a)²/12."""
    low, high = options.get("from", low), options.get("to", high)
    return Uniform(*_constants(out_shape, options, (low + high) / 2, (high - low) ** 2 / 12))


@rule(torch.normal, "normal_", shaped=True)
def normal(
    mean: Any = 0.0, std: Any = 1.0, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **options: Any
) -> Moments:
    """N(m, s²); where mean or deviation vary themselves, ``Var = E s² + Var m`` (law of total variance)."""
    center, spread = (_given(x, out_shape, options) for x in (mean, std))
    return Moments(*torch.broadcast_tensors(center.mean, spread.second + center.var))


@rule("exponential_", shaped=True)
def exponential(lambd: float = 1.0, *, in_shapes: Sequence[Shape], out_shape: Shape, **options: Any) -> Moments:
    """Mean 1/λ, variance 1/λ²."""
    return Moments(*_constants(out_shape, options, 1.0 / lambd, 1.0 / lambd**2))


@rule(torch.bernoulli, "bernoulli", shaped=True)
def bernoulli(x: Any, p: float | None = None, *, in_shapes: Sequence[Shape], out_shape: Shape, **options: Any) -> Moments:
    """1 with probability p, else 0: mean p, variance p(1 − p); p may be a tensor that varies itself, with mean p."""
    chance = _given(x if p is None else p, out_shape, options).mean
    return Moments(chance, chance * (1.0 - chance))


@rule("bernoulli_", shaped=True)
def bernoulli_in_place(p: Any = 0.5, *, in_shapes: Sequence[Shape], out_shape: Shape, **options: Any) -> Moments:
    """As `bernoulli`; what was there is overwritten."""
    return bernoulli(p, in_shapes=in_shapes, out_shape=out_shape, **options)


@rule(torch.poisson, shaped=True)
def poisson(x: Any, *, in_shapes: Sequence[Shape], out_shape: Shape, **options: Any) -> Moments:
    """Counts with mean λ, variance λ; where λ varies itself, ``Var = E λ + Var λ`` (law of total variance)."""
    rate = _given(x, out_shape, options)
    return Moments(rate.mean, rate.mean + rate.var)


def _constants(shape: Shape, options: dict[str, Any], *values: float) -> list[Tensor]:
    """Tensors of one number each that meet a tensor of the given shape."""
    dtype = options.get("dtype")
    dtype = dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.get_default_dtype()
    return [
        torch.full((1,) * len(shape), value, dtype=accumulation_dtype(dtype), device=options.get("device"))
        for value in values
    ]


def _given(x: Any, shape: Shape, options: dict[str, Any]) -> Moments:
    """A number or tensor of a distribution's parameters as moments of the rank that the drawn numbers have."""
    if isinstance(x, Moments):
        return x
    if not isinstance(x, Tensor):
        return Moments(*_constants(shape, options, float(x), 0.0))
    x = x.reshape((1,) * (len(shape) - x.dim()) + tuple(x.shape))
    known = Moments(x, torch.zeros_like(x))
    return known.pooled([0]) if x.dim() and x.shape[0] > 1 else known  # of every sample
