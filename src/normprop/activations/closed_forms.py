"""Moments of exp, sin, cos, sinh, cosh and small powers of a Gaussian, with no small variance left to a difference.

All follow from E e^{ku} = e^{km + k²s²/2} and E z^{2k} = (2k − 1)!! (derived).
"""

import torch
from torch import Tensor

from normprop.activations.normal import Expectations
from normprop.errors import NormPropError


def exp(mean: Tensor, std: Tensor) -> Expectations:
    """E = e^{m+s²/2}, Var = e^{2m+2s²}(1 − e^{−s²})."""
    s2 = std * std
    average = torch.exp(mean + s2 / 2)
    second = torch.exp(2 * (mean + s2))
    return _packed(average, -second * torch.expm1(-s2), second, second, average)


def sin(mean: Tensor, std: Tensor) -> Expectations:
    """E = e^{−s²/2} sin m, Var = ½(1 − q)((1 − q) + 2q cos² m) with q = e^{−s²}."""
    return _wave(torch.sin(mean), torch.cos(mean), std, 1.0)


def cos(mean: Tensor, std: Tensor) -> Expectations:
    """As sin, a quarter of a period on."""
    return _wave(torch.cos(mean), torch.sin(mean), std, -1.0)


def _wave(wave: Tensor, other: Tensor, std: Tensor, sign: float) -> Expectations:
    s2 = std * std
    q, low = torch.exp(-s2), -torch.expm1(-s2)
    low2 = -torch.expm1(-2 * s2)
    damped = torch.exp(-s2 / 2)
    var = 0.5 * low * (low + 2 * q * other * other)
    second = 0.5 * low2 + q * q * wave * wave
    slope = 0.5 * low2 + q * q * other * other
    return _packed(damped * wave, var, second, slope, sign * damped * other)


def sinh(mean: Tensor, std: Tensor) -> Expectations:
    """E = e^{s²/2} sinh m, Var = ½(e^{s²} − 1)(e^{s²} cosh 2m + 1)."""
    s2 = std * std
    square = torch.sinh(mean) ** 2
    rise, rise2 = torch.expm1(s2), torch.expm1(2 * s2)
    var = 0.5 * rise * (torch.exp(s2) * torch.cosh(2 * mean) + 1)
    second = 0.5 * rise2 * torch.cosh(2 * mean) + square
    growth = torch.exp(s2 / 2)
    return _packed(growth * torch.sinh(mean), var, second, second + 1, growth * torch.cosh(mean))


def cosh(mean: Tensor, std: Tensor) -> Expectations:
    """E = e^{s²/2} cosh m, Var = ½(e^{s²} − 1)((e^{s²} − 1) cosh 2m + 2 sinh² m)."""
    s2 = std * std
    square = torch.sinh(mean) ** 2
    rise, rise2 = torch.expm1(s2), torch.expm1(2 * s2)
    var = 0.5 * rise * (rise * torch.cosh(2 * mean) + 2 * square)
    slope = 0.5 * rise2 * torch.cosh(2 * mean) + square
    growth = torch.exp(s2 / 2)
    return _packed(growth * torch.cosh(mean), var, slope + 1, slope, growth * torch.sinh(mean))


def pow(mean: Tensor, std: Tensor, exponent: float) -> Expectations:
    """u, u² or u³; for the last E = m³ + 3ms², Var = 9m⁴s² + 36m²s⁴ + 15s⁶."""
    m2, s2 = mean * mean, std * std
    if exponent == 1:
        return _packed(mean, s2, m2 + s2, torch.ones_like(mean), torch.ones_like(mean))
    if exponent == 2:
        var = s2 * (4 * m2 + 2 * s2)
        return _packed(m2 + s2, var, var + (m2 + s2) ** 2, 4 * (m2 + s2), 2 * mean)
    if exponent == 3:
        average = mean * (m2 + 3 * s2)
        var = s2 * (9 * m2 * m2 + 36 * m2 * s2 + 15 * s2 * s2)
        return _packed(average, var, var + average**2, 9 * (m2 * m2 + 6 * m2 * s2 + 3 * s2 * s2), 3 * (m2 + s2))
    raise NormPropError(
        f"pow: no closed form for the exponent {exponent}; pass a callable such as lambda u: u.pow({exponent})"
    )


def _packed(mean: Tensor, var: Tensor, second: Tensor, slope: Tensor, mean_slope: Tensor) -> Expectations:
    size = (mean.abs() + second + slope).detach()
    return Expectations(mean, var, second, slope, mean_slope, 1e-12 * size)
