"""Moments of any elementwise function of a Gaussian by Gauss-Legendre panels that end where the function bends."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normprop.breakpoints import Breakpoints, find_breakpoints
from normprop.gaussian import Expectations, density, gauss_legendre
from normprop.piecewise import TINY

Function = Callable[[Tensor], Tensor]

__all__ = ["Breakpoints", "find_breakpoints", "integrate", "integrate_slope"]

# φ(z) is 1e-314 here; no integrand that is worth a float64 lies beyond.
_REACH = 38.0
# Within this distance a NaN is part of the answer, beyond it the Gaussian has no mass.
_MASS = 9.0


def integrate(fn: Function, mean: Tensor, std: Tensor, breakpoints: Breakpoints, *, order: int = 12) -> Expectations:
    """Moments of fn(u), u ~ N(mean, std²), by Gauss-Legendre of the given order on every panel between two breakpoints.

    Static tensor operations only: it compiles, exports, and works under vmap and double backward, where panel ends
    move with mean and std, so that kinks and jumps are differentiated, too. Where fn is continuous, the deviation
    fn(u) − fn(mean) is the integral of the slope along the panels rather than a difference of two values: a small std
    costs no digits. The error is the difference to the rule of two orders less.

    Args:
        fn: an elementwise function of a tensor.
        mean: float tensor, any shape.
        std: float tensor of the same shape, not negative.
        breakpoints: where fn bends, from `find_breakpoints(fn)`, found once and outside of traced code.
        order: nodes per panel.

    >>> points = find_breakpoints(torch.relu)
    >>> integrate(torch.relu, torch.tensor(0.0).double(), torch.tensor(1.0).double(), points).second
    tensor(0.5000, dtype=torch.float64)
    """
    reach = mean.new_full((), _REACH)
    edges = _panel_edges(breakpoints.edges, mean, std, reach, reach, 16)
    fine = _integrate_values(fn, mean, std, edges, breakpoints, order)
    coarse = _integrate_values(fn, mean, std, edges.detach(), breakpoints, order - 2)
    gaps = [(a - b).abs().detach() for a, b in zip(fine[:4], coarse[:4], strict=True)]
    error = torch.stack([torch.where(gap.isnan(), 0.0, gap) for gap in gaps]).amax(0)
    size = torch.where(fine.slope.isinf(), 0.0, fine.slope.detach()) + fine.second.detach()
    return fine._replace(error=error + 1e-14 * size)


def _integrate_values(
    fn: Function, mean: Tensor, std: Tensor, edges: Tensor, at: Breakpoints, order: int
) -> Expectations:
    z, measure, width = _nodes(edges, order)
    # Panels without width or weight may sit on a singularity.
    weightless = measure == 0
    u = torch.where(weightless, mean, mean + std * z)
    value = fn(u)
    slope = torch.func.grad(lambda x: fn(x).sum())(u)
    value, slope = (torch.where(weightless | ((z.abs() > _MASS) & x.isnan()), 0.0, x) for x in (value, slope))
    average = _total(measure * value)
    if at.jumps:
        moved = value - average.detach()
    else:
        moved = _along(slope, edges, width * std, order)
        moved = moved - _total(measure * moved).detach()
    shift = _total(measure * moved)
    var = _total(measure * moved.square()) - shift.square()
    mean_slope = _total(measure * slope)
    energy = _total(measure * slope.square())
    if at.jumps:
        safe = std.clamp_min(TINY)
        for jump in at.jumps:
            sides = fn(mean.new_tensor([math.nextafter(jump, -math.inf), jump, math.nextafter(jump, math.inf)]))
            mean_slope = mean_slope + (sides[2] - sides[0]) * density(((jump - mean) / safe).clamp(-60, 60)) / safe
        energy = torch.full_like(energy, math.inf)
    second = _total(measure * value.square())
    return Expectations(average, var, second, energy, mean_slope, torch.zeros_like(average))


def integrate_slope(
    value: Function,
    slope: Function,
    mean: Tensor,
    std: Tensor,
    *,
    points: Sequence[float],
    rate: float | Tensor,
    kinks: bool,
    order: int,
) -> Expectations:
    """Moments of a continuous function from its slope: the function is its value at the mean plus an integral.

    Every second moment is a sum of positive terms, so tails keep their digits if `slope` does.

    Args:
        value: the function, evaluated only at the mean.
        slope: its derivative.
        mean: float tensor, any shape.
        std: float tensor of the same shape.
        points: panel ends, ascending, geometrically spaced around the place where the function bends.
        rate: bound on |d log slope² / du| near the mean, which says how far the mass of slope² φ may lie from the mean.
        kinks: whether the slope jumps at a point, so that the panels' motion with mean and std matters to a derivative.
        order: nodes per panel.
    """
    safe = std.clamp_min(TINY)
    # The tails of float32 end at 13 standard deviations.
    panels, farthest = (9, _REACH) if order >= 10 else (6, 18.0)
    extra = torch.minimum(mean.abs() / safe, rate * std).clamp(max=farthest - _MASS)
    left, right = (_MASS + torch.where(toward, extra, 0.0) for toward in (mean > 0, mean <= 0))
    edges = _panel_edges(points, mean, std, left, right, panels)
    if not kinks:
        edges = edges.detach()
    z, measure, width = _nodes(edges, order)
    slopes = slope(mean + std * z)
    moved = _along(slopes, edges, width * std, order)
    shift = _total(measure * moved)
    average = value(mean) + shift
    var = _total(measure * moved.square()) - shift.square()
    energy = _total(measure * slopes.square())
    second = var + average.square()
    accuracy = 1e-10 if order >= 10 else 1e-6
    size = (second + average.abs() + energy).detach()
    return Expectations(average, var, second, energy, _total(measure * slopes), accuracy * size)


def _total(x: Tensor) -> Tensor:
    return x.sum((0, 1))


def _panel_edges(
    points: Sequence[float], mean: Tensor, std: Tensor, left: Tensor, right: Tensor, panels: int
) -> Tensor:
    """Ends of the panels in units of std, ascending, [edges, …]: the function's points and an even grid."""
    grid = mean.new_tensor([i / panels for i in range(panels + 1)]).reshape(-1, *[1] * mean.dim())
    even = torch.cat([-left * grid[1:].flip(0), right * grid]).expand(-1, *mean.shape)
    marks = mean.new_tensor(points).reshape(-1, *[1] * mean.dim())
    z = (marks - mean) / std.clamp_min(TINY)
    return _merge(torch.maximum(torch.minimum(z, right), -left), even)


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """Two ascending sequences as one, along the first dimension, by a bitonic network: cheaper than a sort."""
    total = a.shape[0] + b.shape[0]
    size = 1 << (total - 1).bit_length()
    x = torch.cat([a, b[-1:].expand(size - total, *b.shape[1:]), b.flip(0)])
    step = size // 2
    while step:
        low, high = x.reshape(-1, 2, step, *x.shape[1:]).unbind(1)
        x = torch.stack([torch.minimum(low, high), torch.maximum(low, high)], dim=1).reshape(x.shape)
        step //= 2
    return x[:total]


def _nodes(edges: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes z and Gaussian weights, [panel, node, …], and widths, [panel, 1, …]."""
    nodes, weights = (x.reshape(-1, *[1] * (edges.dim() - 1)) for x in gauss_legendre(order, edges))
    width = edges.diff(dim=0).unsqueeze(1)
    z = edges[:-1].unsqueeze(1) + width * nodes
    return z, width * weights * density(z), width


def _along(slope: Tensor, edges: Tensor, width: Tensor, order: int) -> Tensor:
    """∫ slope du from the mean to every node, [panel, node, …]: outwards on both sides, so that nothing cancels."""
    rows = slope.new_tensor(_ANTIDERIVATIVES[order])
    inside = (rows @ slope.flatten(2) if slope.dim() > 2 else slope @ rows.T).reshape(
        slope.shape[0], order + 1, *slope.shape[2:]
    )
    inside = inside * width
    whole = inside[:, order]
    right = (edges[:-1] >= 0).to(slope)
    outward, inward = whole * right, whole * (1 - right)
    base = outward.cumsum(0) - outward - inward.flip(0).cumsum(0).flip(0)
    return base.unsqueeze(1) + inside[:, :order]


def _antiderivative(order: int) -> list[list[float]]:
    """Row j integrates the polynomial through the nodes' values from 0 to node j, and the last row to 1."""
    nodes, _ = gauss_legendre(order, torch.zeros((), dtype=torch.float64))
    k = torch.arange(order, dtype=torch.float64)
    x = 2 * torch.cat([nodes, torch.ones(1, dtype=torch.float64)]) - 1
    legendre = torch.special.legendre_polynomial_p(x[:, None], torch.arange(order + 1, dtype=torch.float64))
    # ∫ P_k = (P_{k+1} − P_{k−1}) / (2k + 1), half of it for the unit interval.
    before = torch.cat([-torch.ones(order + 1, 1, dtype=torch.float64), legendre[:, : order - 1]], dim=1)
    integrals = (legendre[:, 1:] - before) / (2 * (2 * k + 1))
    rows: list[list[float]] = torch.linalg.solve(legendre[:-1, :order].T, integrals.T).T.tolist()
    return rows


_ANTIDERIVATIVES = {order: _antiderivative(order) for order in range(4, 25)}
