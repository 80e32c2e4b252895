"""Moments of floor, ceil, round and trunc of a Gaussian, for any mean and std (derived).

A narrow Gaussian meets few integers: sums over those. A wide one meets so many that the fraction of u is nearly uniform:
with q = e^{−2π²k²s²}, the Fourier series of the fraction {u} and of its square give::

    E {u} = ½ − Σ q sin(2πkm)/(πk)        E {u}² = ⅓ + Σ q (cos(2πkm)/(πk)² − sin(2πkm)/(πk))
    E ⌊u⌋ = m − E {u}                     Var ⌊u⌋ = s² + Var {u} − 2s² d E {u}/dm                 (Stein)
"""

import math

import torch
from torch import Tensor

from normprop.activations.normal import FAR, Expectations, density
from normprop.activations.piecewise import TINY

_WIDE = 0.5  # stds from here on take the Fourier series
_TERMS = 3  # the next one is 1e-34 there
_TRUNC_WIDE = 4.0  # for trunc, whose step around 0 is twice as wide
# B_{2n}/(2n)! of the Euler-Maclaurin formula
_BERNOULLI = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160)


def floor(mean: Tensor, std: Tensor) -> Expectations:
    """⌊u⌋."""
    levels = _around(mean, 6)
    return _chosen(std < _WIDE, _few(mean, std.clamp(max=_WIDE), levels, levels[:-1] + 1), _many(mean, std.clamp(min=_WIDE)))


def ceil(mean: Tensor, std: Tensor) -> Expectations:
    """⌈u⌉ = −⌊−u⌋."""
    below = floor(-mean, std)
    return below._replace(mean=-below.mean)


def round(mean: Tensor, std: Tensor, decimals: int = 0) -> Expectations:
    """⌊u + ½⌋, in units of 10^{−decimals}."""
    unit = 10.0**decimals
    found = floor(mean * unit + 0.5, std * unit)
    return _packed(found.mean / unit, found.var / unit**2, found.mean_slope)


def trunc(mean: Tensor, std: Tensor) -> Expectations:
    """⌊u⌋ + b with b = 1 below 0, so that ``Var = Var ⌊u⌋ + Var b + 2 Cov(u, b) − 2 Cov({u}, b)``.

    Cov(u, b) = −s φ(m/s) (Stein), and of a wide Gaussian with the density p ``E ({u} − ½) b = Σ B_{2n}/(2n)! p^{(2n−2)}(0)``
    (Euler and Maclaurin).
    """
    levels = _around(mean, 40)
    ends = torch.where(levels >= 0, levels + 1, levels)[:-1]
    few = _few(mean, std.clamp(max=_TRUNC_WIDE), levels, ends)
    s = std.clamp(min=_TRUNC_WIDE)
    many, z = _many(mean, s), mean / s
    share = torch.special.ndtr(-z)
    hermite = [torch.ones_like(z), z]
    for n in range(1, 2 * len(_BERNOULLI)):
        hermite.append(z * hermite[n] - n * hermite[n - 1])
    series = torch.stack([b * hermite[2 * n] / s ** (2 * n) for n, b in enumerate(_BERNOULLI)]).sum(0)
    fraction = series * density(z) / s - (mean - many.mean - 0.5) * share
    var = many.var + share * (1 - share) - 2 * s * density(z) - 2 * fraction
    return _chosen(std < _TRUNC_WIDE, few, _packed(many.mean + share, var, many.mean_slope - density(z) / s))


def _around(mean: Tensor, count: int) -> Tensor:
    """Integers next to the mean, [level, …]."""
    steps = torch.arange(-count, count + 1, dtype=mean.dtype, device=mean.device)
    return mean.detach().floor() + steps.reshape(-1, *[1] * mean.dim())


def _few(mean: Tensor, std: Tensor, levels: Tensor, ends: Tensor) -> Expectations:
    """A sum over levels and the ends between them."""
    s = std.clamp_min(TINY)
    z = ((ends - mean) / s).clamp(-FAR, FAR)
    last = torch.full_like(z[:1], FAR)
    low, high = torch.cat([-last, z]), torch.cat([z, last])
    # From the side on which both are small.
    right = low > 0
    mass = torch.special.ndtr(torch.where(right, -low, high)) - torch.special.ndtr(torch.where(right, -high, low))
    middle = mean.detach().floor()
    average = ((levels - middle) * mass).sum(0)
    var = (mass * (levels - middle - average).square()).sum(0)
    return _packed(middle + average, var, (levels.diff(dim=0) * density(z)).sum(0) / s)


def _many(mean: Tensor, std: Tensor) -> Expectations:
    """The Fourier series for ⌊u⌋."""
    k = torch.arange(1, _TERMS + 1, dtype=mean.dtype, device=mean.device).reshape(-1, *[1] * mean.dim())
    s2 = std.square()
    q = torch.exp(-2 * math.pi**2 * k.square() * s2)
    angle = 2 * math.pi * k * (mean - mean.detach().floor())
    sine, cosine = torch.sin(angle) / (math.pi * k), torch.cos(angle) / (math.pi * k).square()
    fraction = 0.5 - (q * sine).sum(0)
    square = 1 / 3 + (q * (cosine - sine)).sum(0)
    slope = -2 * (q * torch.cos(angle)).sum(0)
    return _packed(mean - fraction, s2 + square - fraction.square() - 2 * s2 * slope, 1 - slope)


def _chosen(where: Tensor, a: Expectations, b: Expectations) -> Expectations:
    return Expectations(*(torch.where(where, x, y) for x, y in zip(a, b, strict=True)))


def _packed(mean: Tensor, var: Tensor, mean_slope: Tensor) -> Expectations:
    second = var + mean.square()
    return Expectations(mean, var, second, torch.full_like(var, math.inf), mean_slope, 1e-12 * (1 + second).detach())
