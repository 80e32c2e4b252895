"""Moments of any elementwise function of a Gaussian by Gauss-Legendre panels that end where the function bends."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normprop.activations.breakpoints import Breakpoints, find_breakpoints
from normprop.activations.normal import Expectations, density, gauss_legendre, has_values
from normprop.activations.piecewise import TINY
from normprop.activations.small_variance import continued, smallest_std

Function = Callable[[Tensor], Tensor]

__all__ = ["Breakpoints", "find_breakpoints", "integrate", "integrate_slope", "mean_and_variance"]

# φ(z) is 1e-314 here; no integrand that is worth a float64 lies beyond.
_REACH = 38.0
_ROUNDING = 2.0**-52  # by which the place of a jump may be off
# Within this distance a NaN is part of the answer, beyond it the Gaussian has no mass.
_MASS = 9.0


def integrate(fn: Function, mean: Tensor, std: Tensor, breakpoints: Breakpoints, *, order: int = 12) -> Expectations:
    """Moments of fn(u), u ~ N(mean, std²), by Gauss-Legendre of the given order on every panel between two breakpoints.

    Static tensor operations only: it compiles, exports, and works under vmap and double backward. Where fn is
    continuous, the deviation fn(u) − fn(mean) is the integral of the slope along the panels rather than a difference
    of two values: a small std costs no digits. A derivative by a parameter of fn that moves a kink misses the kink in
    `slope` alone.

    Args:
        fn: an elementwise function of a tensor.
        mean: float tensor, any shape.
        std: float tensor of the same shape, not negative.
        breakpoints: where fn bends, from `find_breakpoints(fn)`, found once and outside of traced code.
        order: nodes per panel; the error is the difference to the rule of two nodes less, and rounding.

    >>> points = find_breakpoints(torch.relu)
    >>> integrate(torch.relu, torch.tensor(0.0).double(), torch.tensor(1.0).double(), points).second
    tensor(0.5000, dtype=torch.float64)
    """
    narrow = _narrow(fn, mean, std)
    m, s = (x if narrow is None else torch.where(narrow, x.detach(), x) for x in (mean, std))
    fine = _integrate_values(fn, m, s, breakpoints, order)
    coarse = _integrate_values(fn, mean.detach(), std.detach(), breakpoints, order - 2)
    gaps = [(a - b).abs().detach() for a, b in zip(fine[:4], coarse[:4], strict=True)]
    # The variance is of differences from the mean, by the slopes: two moments by values are another way to the same number,
    # themselves a little off.
    by_values = gaps[2] + 2.0 * fine.mean.abs().detach() * gaps[0]
    gaps.append(2.0 * (fine.var - (fine.second - fine.mean.square())).abs().detach() + by_values)
    error = torch.stack([torch.where(gap.isnan(), 0.0, gap) for gap in gaps]).amax(0)
    size = torch.where(fine.slope.isinf(), 0.0, fine.slope.detach()) + fine.second.detach() + fine.mean.detach().abs()
    if narrow is not None:
        fine = _with_slopes(fine, _limit(fn, mean, std, breakpoints, order), narrow)
    return fine._replace(error=error + 1e-14 * size + fine.error)


def _narrow(fn: Function, mean: Tensor, std: Tensor) -> Tensor | None:
    """Where the std is so small that derivatives are those of the limit; None if that is known to be nowhere."""
    with torch.no_grad():
        narrow = std < smallest_std(mean, fn(mean).to(mean), kinked=True)
    return narrow if not has_values(narrow) or bool(narrow.any()) else None


def _limit(fn: Function, mean: Tensor, std: Tensor, at: Breakpoints, order: int) -> Expectations:
    """`integrate` for a std near 0, with the derivatives of the limit."""
    rest: list[Expectations] = []

    def evaluate(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        rest.append(_integrate_values(fn, mean, std, at, order))
        return rest[0].mean, rest[0].var

    jumping = bool(at.jumps)
    center = fn(mean if jumping else mean.detach()).to(mean)
    average, var = continued(evaluate, mean, std.square(), center, kinked=True, jumping=jumping)
    return rest[0]._replace(mean=average, var=var, second=var + average.square())


def _with_slopes(values: Expectations, slopes: Expectations, where: Tensor) -> Expectations:
    """The values of one and the derivatives of the other."""
    pairs = zip(values, slopes, strict=True)
    return Expectations(*(torch.where(where, a.detach() + (b - b.detach()).nan_to_num(), a) for a, b in pairs))


def mean_and_variance(
    fn: Function,
    mean: Tensor,
    var: Tensor,
    points: Sequence[float],
    *,
    order: int = 12,
    reach: float = 14.0,
    kinked: bool = True,
    jumping: bool = False,
) -> tuple[Tensor, Tensor]:
    """E fn(u) and Var fn(u), u ~ N(mean, var): the two of `integrate` that a moment lane needs, in a third of its work.

    Static tensor operations only, any number of times differentiable in mean, var and what fn closes over, with the
    derivatives of the limit at var = 0 (see `continued`). The variance is that of differences from the mean, so a std
    that is small beside fn(mean) costs digits.

    Args:
        fn: an elementwise function of a tensor.
        mean: float tensor, any shape.
        var: float tensor of the same shape, not negative.
        points: ascending; where fn bends.
        order: nodes per panel.
        reach: standard deviations on both sides of the mean beyond which fn counts for nothing.
        kinked: whether fn may have a kink or a jump.
        jumping: whether it may have a jump.

    >>> found = mean_and_variance(torch.relu, torch.tensor(0.0).double(), torch.tensor(1.0).double(), [0.0])
    >>> print(f"{found[0]:.6f} {found[1]:.6f}")
    0.398942 0.340845
    """
    count = math.ceil(reach / 2.5)

    def evaluate(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        grid = _column([reach * i / count for i in range(-count, count + 1)], mean).expand(-1, *mean.shape)
        rule = _rule(_merge(_marks(points, mean, std, reach), grid), mean, std, order)
        weightless = rule.measure.detach() == 0
        value = torch.where(weightless, 0.0, fn(torch.where(weightless, mean.detach(), rule.u)).to(mean))
        average = _total(rule.measure * value)
        return average, _variance(value - average.detach(), rule)

    center = fn(mean if jumping else mean.detach()).to(mean)
    return continued(evaluate, mean, var, center, kinked=kinked, jumping=jumping)


def _integrate_values(fn: Function, mean: Tensor, std: Tensor, at: Breakpoints, order: int) -> Expectations:
    grid = _column([_REACH * i / 16 for i in range(-16, 17)], mean).expand(-1, *mean.shape)
    edges = _merge(_marks(at.edges, mean, std, _REACH), grid)
    rule = _rule(edges, mean, std, order)
    # Panels without width or weight may sit on a singularity.
    weightless = rule.measure.detach() == 0
    u = torch.where(weightless, mean.detach(), rule.u)
    value = fn(u).to(mean)
    slope = torch.func.grad(lambda x: fn(x).to(mean).sum())(u)
    ignored = weightless | ((rule.u - mean).abs() > _MASS * std)
    value, slope = (torch.where(weightless | (ignored & x.isnan()), 0.0, x) for x in (value, slope))
    average = _total(rule.measure * value)
    var = _variance(value - average.detach(), rule)
    if not at.jumps:
        # The better value, and the gradient by fn's own parameters, which the slope does not know about at kinks.
        along = _along(slope, edges, rule.width, order)
        along = along - _total(rule.measure * along).detach()
        var = var + (_variance(along, rule) - var).detach()
    mean_slope = _total(rule.measure * slope)
    energy = _total(rule.measure * slope.square())
    misplaced = torch.zeros_like(average).detach()
    if at.jumps:
        for jump in at.jumps:
            sides = fn(_column([math.nextafter(jump, -math.inf), math.nextafter(jump, math.inf)], mean)).to(mean)
            at_jump = density(((jump - mean) / std.clamp_min(TINY)).clamp(-60, 60)) / std.clamp_min(TINY)
            mean_slope = mean_slope + (sides[1] - sides[0]) * at_jump
            heights = (sides[1] - sides[0]).abs() * (1 + 2 * sides.abs().amax(0))
            misplaced = misplaced + (heights * (at_jump * (4 * _ROUNDING * abs(jump))).clamp(max=1.0)).detach()
        energy = torch.full_like(energy, math.inf)
    second = _total(rule.measure * value.square())
    return Expectations(average, torch.where(std > 0, var, 0.0), second, energy, mean_slope, misplaced)


def integrate_slope(
    value: Function,
    slope: Function,
    mean: Tensor,
    std: Tensor,
    *,
    points: Sequence[float],
    rate: Tensor,
    order: int,
) -> Expectations:
    """Moments of a continuous function from its slope: the function is its value at the mean plus an integral.

    Every second moment is a sum of positive terms, so tails keep their digits if `slope` does.

    Args:
        value: the function, evaluated only at the mean.
        slope: its derivative.
        mean: float tensor, any shape.
        std: float tensor of the same shape.
        points: panel ends, ascending, geometrically spaced around 0, where the function bends.
        rate: bound on |d log slope² / du| near the mean, which says how far the mass of slope² φ may lie from the mean.
        order: nodes per panel.
    """
    center, width = mean.detach(), std.detach()
    # The tails of float32 end at 13 standard deviations, those of float64 at 38.
    core, far, farthest = (6, 10, _REACH) if order >= 10 else (5, 3, 18.0)
    extra = torch.minimum(center.abs() / width.clamp_min(TINY), rate.detach() * width).clamp(max=farthest - _MASS)
    outward = _MASS + extra * _column([i / far for i in range(1, far + 1)], mean)
    toward = torch.where(center < 0, outward, -outward.flip(0))
    grid = _column([_MASS * i / core for i in range(-core, core + 1)], mean).expand(-1, *mean.shape)
    edges = _merge(toward, _merge(_marks(points, mean, std, farthest), grid))

    rule = _rule(edges, mean, std, order)
    slopes = slope(rule.u)
    along = _along(slopes, edges, rule.width, order)
    average = value(center) + _total(rule.measure * along)
    var = torch.where(std > 0, _variance(along, rule), 0.0)
    mean_slope, energy = _total(rule.measure * slopes), _total(rule.measure * slopes.square())
    # Almost without spread the derivative of a density is rounding error divided by std; that of the slope is not.
    narrow = std < 1e-8
    at_mean = slope(torch.where(narrow, mean, center))
    mean_slope = torch.where(narrow, mean_slope.detach() + (at_mean - at_mean.detach()), mean_slope)
    energy = torch.where(narrow, energy.detach() + (at_mean.square() - at_mean.square().detach()), energy)
    second = var + average.square()
    accuracy = 1e-12 if order >= 10 else 1e-5
    size = (second.sqrt() + second + energy).detach()
    return Expectations(average, var, second, energy, mean_slope, accuracy * size)


class _Rule(NamedTuple):
    """Nodes u and their weights under N(mean, std²), [panel, node, …], and the panels' widths in u, [panel, 1, …]."""

    u: Tensor
    measure: Tensor
    width: Tensor


def _rule(edges: Tensor, mean: Tensor, std: Tensor, order: int) -> _Rule:
    """The nodes are constants, and the density at a node is what depends on mean and std.

    So E F(u) = Σ w F(u_j) p(u_j; mean, std) differentiates any number of times, whatever kinks and jumps F has.
    """
    nodes, weights = (x.reshape(-1, *[1] * mean.dim()) for x in gauss_legendre(order, edges))
    s = std.clamp_min(TINY)
    center, scale = mean.detach(), s.detach()
    width = edges.diff(dim=0).unsqueeze(1)
    z = edges[:-1].unsqueeze(1) + width * nodes
    u = center + scale * z
    z = z * (scale / s) - (mean - center) / s
    measure = torch.exp(-0.5 * z * z) * (weights * (width * (scale / s / math.sqrt(2 * math.pi))))
    return _Rule(u, measure, width * scale)


def _variance(deviation: Tensor, rule: _Rule) -> Tensor:
    """Not negative, as the difference may be where it is nothing but rounding."""
    return (_total(rule.measure * deviation.square()) - _total(rule.measure * deviation).square()).clamp(min=0.0)


def _total(x: Tensor) -> Tensor:
    return x.sum((0, 1))


def _marks(points: Sequence[float], mean: Tensor, std: Tensor, reach: float) -> Tensor:
    """The function's points in units of std, [points, …]; those out of reach make panels without width."""
    center, scale = mean.detach(), std.detach().clamp_min(TINY)
    return ((_column(points, mean) - center) / scale).clamp(-reach, reach)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).reshape(-1, *[1] * like.dim())


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """Two ascending sequences as one, along the first dimension, by a bitonic network: cheaper than a sort."""
    total = a.shape[0] + b.shape[0]
    size = 1 << (total - 1).bit_length()
    last = torch.maximum(a[-1:], b[-1:])
    x = torch.cat([a, last.expand(size - total, *last.shape[1:]), b.flip(0)])
    step = size // 2
    while step:
        low, high = x.reshape(size // (2 * step), 2, step, *x.shape[1:]).unbind(1)
        x = torch.stack([torch.minimum(low, high), torch.maximum(low, high)], dim=1).reshape(x.shape)
        step //= 2
    return x[:total]


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
