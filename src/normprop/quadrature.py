"""Moments of any elementwise function of a Gaussian by quadrature between its kinks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normprop.gaussian import Expectations, density, gauss_legendre

Function = Callable[[Tensor], Tensor]

_REACH = 38.0


def integrate(fn: Function, mean: Tensor, std: Tensor, breakpoints: Sequence[float] = (), *, order: int = 10) -> Expectations:
    """Moments of fn(u), u ~ N(mean, std²), by composite Gauss-Legendre on panels that end at the breakpoints."""
    edges = torch.tensor(
        sorted({*breakpoints, 0.0, *(sign * 2.0**k for k in range(-1, 12) for sign in (-1, 1))}), dtype=mean.dtype, device=mean.device
    )
    grid = torch.linspace(-_REACH, _REACH, 39, dtype=mean.dtype, device=mean.device)
    z = ((edges - mean[..., None]) / std.clamp_min(1e-140)[..., None]).clamp(-_REACH, _REACH)
    z = torch.cat([z, grid.expand(z.shape[:-1] + grid.shape)], dim=-1).sort(dim=-1).values
    nodes, weights = gauss_legendre(order, mean)
    width = z.diff(dim=-1)
    points = (z[..., :-1, None] + width[..., None] * nodes).flatten(-2).detach()
    measure = (width[..., None] * weights).flatten(-2).detach() * density(points)
    u = mean[..., None] + std[..., None] * points
    value = fn(u)
    derivative = torch.func.grad(lambda x: fn(x).sum())(u)
    average = (measure * value).sum(-1)
    moved = value - average.detach()[..., None]
    shift = (measure * moved).sum(-1)
    var = (measure * moved * moved).sum(-1) - shift * shift
    second = (measure * value * value).sum(-1)
    slope = (measure * derivative * derivative).sum(-1)
    error = 1e-9 * (second + slope).detach()
    return Expectations(average, var, second, slope, (measure * derivative).sum(-1), error)
