"""Where a function of one variable kinks, jumps or varies: the panels on which it is a polynomial."""

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from normprop.activations.crossings import find_crossings, roundest
from normprop.errors import NormPropError

Function = Callable[[Tensor], Tensor]

_ORDER = 14
_TOLERANCE = 1e-11
_EPSILON = 2.0**-52
_NOISE = 1e-5
_TURNS = 8  # of joining panels
# Halvings next to a singularity that no panel end removes, such as that of √|u|.
_DEPTH = 30


class Breakpoints(NamedTuple):
    """Panel ends between which a function is smooth at the scale of the panel.

    edges: ascending, kinks and jumps among them. jumps: those where the value jumps. resolved: whether the search
    came to an end; otherwise the function varies faster, or jumps more often, than `limit` panels can follow. seen:
    whether all of it was made of torch's operations; otherwise something narrow may have stayed hidden. rough: the
    panels that are not resolved.
    """

    edges: tuple[float, ...]
    jumps: tuple[float, ...] = ()
    resolved: bool = True
    seen: bool = True
    rough: tuple[tuple[float, float], ...] = ()


def find_breakpoints(
    fn: Function, low: float = -1e4, high: float = 1e4, *, limit: int = 256, straight: float = math.inf
) -> Breakpoints:
    """Panels that resolve an elementwise fn on [low, high], with its kinks and jumps located to the last digit.

    Panels start at what the operations inside fn tell apart (see `find_crossings`) and at powers of two, and are halved
    until fn is a polynomial on each, to rounding error. Those that are still not at the finest width hold a kink or a jump;
    it becomes a panel end, and the panels are built afresh around it.

    Args:
        fn: takes float64 tensors of any shape.
        low: where to begin.
        high: where to end.
        limit: unresolved panels at a time.
        straight: beyond this distance from 0 powers of two are kept only if fn is no polynomial across them.

    >>> find_breakpoints(lambda x: torch.where(x > 1, x.square(), -x)).jumps
    (1.0,)
    """
    near = torch.linspace(max(low, min(high, -4.0)), min(high, max(low, 4.0)), 65, dtype=torch.float64)
    crossings = find_crossings(fn, low, high)
    scale = max(_largest(fn, near), 1e-3 * _largest(fn, torch.tensor(crossings.points, dtype=torch.float64)))
    ladder = {low, high, *(x for x in _ladder() if low < x < high)}
    start = _distinct(sorted({*ladder, *crossings.points}))
    singular, _, complete = _refine(fn, start, scale, limit, math.inf)
    _, edges, resolved = _refine(fn, _distinct(sorted({*start, *singular})), scale, limit, _DEPTH)
    jumps = _jumps(fn, edges, scale)
    kept = {x for x in ladder if abs(x) <= straight}
    edges = _joined(fn, edges, {low, high, *kept, *singular, *jumps}, scale)
    rough: list[list[float]] = []
    if not (complete and resolved):
        panels = torch.tensor(list(pairwise(edges)), dtype=torch.float64)
        rough = panels[~_resolved(fn, panels, scale)].tolist()
    return Breakpoints(tuple(edges), jumps, complete and resolved, crossings.seen, tuple((a, b) for a, b in rough))


def check_elementwise(fn: Function, low: float = -3.0, high: float = 3.0) -> None:
    """NormPropError if fn is random, or its value at one place depends on other places; tried between low and high."""
    near = (max(low, -3.0), min(high, 3.0)) if low < 3 and high > -3 else (low, high)
    probe = torch.linspace(*near, 12, dtype=torch.float64)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is about to be refused
            whole = fn(probe.clone())
            grid = fn(probe.reshape(3, 4).clone())
            part = fn(probe[7:9].clone())
            again = fn(probe.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.func.grad(lambda x: fn(x).sum())(probe)
    except NormPropError:
        raise
    except Exception as reason:
        raise NormPropError(f"the activation cannot be applied to a float64 tensor of any shape: {reason}") from reason
    if not isinstance(whole, Tensor) or whole.shape != probe.shape or grid.shape != (3, 4):
        raise NormPropError("the activation changes the shape of its input: it is not elementwise")
    if not torch.equal(whole.nan_to_num(), again.nan_to_num()):
        raise NormPropError("the activation is random: put it into eval mode, or pass its mean function")
    same = (whole[7:9], part), (whole.reshape(3, 4), grid)
    if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True) for a, b in same):
        raise NormPropError("the activation's output at one place depends on other places: it is not elementwise")


def _joined(fn: Function, edges: list[float], kept: set[float], scale: float) -> list[float]:
    """The panel ends without those that nothing needs: fn is a polynomial across them."""
    left = edges
    for turn in range(_TURNS):
        start = 1 + turn % 2
        candidates = [i for i in range(start, len(left) - 1, 2) if left[i] not in kept]  # no two neighbours at a time
        needless: set[float] = set()
        if candidates:
            panels = torch.tensor([[left[i - 1], left[i + 1]] for i in candidates], dtype=torch.float64)
            parts = torch.tensor([left[i - 1 : i + 2] for i in candidates], dtype=torch.float64)
            checks = [parts[:, :1] + share * (parts[:, 1:2] - parts[:, :1]) for share in (0.1, 0.5, 0.9, 1.0)]
            checks += [parts[:, 1:2] + share * (parts[:, 2:] - parts[:, 1:2]) for share in (0.1, 0.5, 0.9)]
            smooth = _resolved(fn, panels, scale, torch.cat(checks, dim=1)).tolist()
            needless = {left[i] for i, one in zip(candidates, smooth, strict=True) if one}
        left = [x for x in left if x not in needless]
    return left


def _ladder() -> list[float]:
    return [0.0, *(sign * 2.0**k for k in range(-2, 14) for sign in (-1, 1))]


def _refine(
    fn: Function, start: list[float], scale: float, limit: int, depth: float
) -> tuple[list[float], list[float], bool]:
    """Halve unresolved panels: the points where that never ends, all panel ends, and whether the budget sufficed."""
    edges = set(start)
    singular: set[float] = set()
    work = torch.tensor([[a, b] for a, b in pairwise(start)], dtype=torch.float64)
    middle = work.new_zeros(0)
    level = 0
    while len(work) and level < depth:
        resolved = _resolved(fn, work, scale)
        if len(middle):
            # A narrow panel of which both halves are smooth was split at the very point.
            left, right = work[: len(middle)], work[len(middle) :]
            narrow = right[:, 1] - left[:, 0] < 1e-6 * middle.abs()
            singular.update(middle[narrow & resolved[: len(middle)] & resolved[len(middle) :]].tolist())
        work = work[~resolved]
        if len(work) > limit:
            return sorted(singular), sorted(edges), False
        middle = work.mean(1)
        finest = work[:, 1] - work[:, 0] <= 4 * _EPSILON * middle.abs().clamp(min=1e-6)
        singular.update(roundest(a, b) for a, b in work[finest].tolist())
        work, middle = work[~finest], middle[~finest]
        edges.update(middle.tolist())
        work = torch.cat([torch.stack([work[:, 0], middle], 1), torch.stack([middle, work[:, 1]], 1)])
        level += 1
    return sorted(singular), sorted(edges), True


def _distinct(points: list[float]) -> list[float]:
    """Ascending points without repetitions: a singularity near the border of two panels is found once in each."""
    kept = points[:1]
    for point in points[1:]:
        if point - kept[-1] > 64 * _EPSILON * max(abs(point), 1e-6):
            kept.append(point)
        elif len(repr(point)) < len(repr(kept[-1])):
            kept[-1] = point
    return kept


def _jumps(fn: Function, edges: list[float], scale: float) -> tuple[float, ...]:
    """Edges over which the value changes by an amount that does not shrink with the distance."""
    k = torch.tensor(edges, dtype=torch.float64)
    offsets = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)

    def gap(relative: float) -> Tensor:
        values = _values(fn, k[:, None] + relative * k[:, None].abs().clamp(min=1e-3) * offsets)
        return (2 * (values[:, 2] - values[:, 1]) - (values[:, 3] - values[:, 0])).abs()

    coarse, close = gap(1e-10), gap(1e-14)
    size = _values(fn, k).abs().nan_to_num(0.0, 0.0, 0.0).clamp(min=scale)
    found = close.isfinite() & (close > 1e-9 * size) & (close > 0.5 * coarse)
    return tuple(k[found].tolist())


def _resolved(fn: Function, panels: Tensor, scale: float, checks: Tensor | None = None) -> Tensor:
    """Whether the last Chebyshev coefficients of value and slope on each panel are rounding error.

    Args:
        fn: the function.
        panels: their ends, ``(n, 2)``.
        scale: of the function.
        checks: further places within each panel where the polynomial has to be the function, ``(n, k)``.
    """
    k = torch.arange(_ORDER, dtype=torch.float64)
    angles = math.pi * (k + 0.5) / _ORDER
    low, high = panels.unbind(1)
    # Next to both ends, where a kink would hide from the Chebyshev points.
    inset = torch.maximum((high - low) * 1e-7, 4 * _EPSILON * panels.abs().amax(1)).minimum((high - low) / 4)
    x = low[:, None] + (high - low)[:, None] * (1 + torch.cos(angles)) / 2
    checks = torch.stack([high - inset, low + inset, *(() if checks is None else checks.unbind(1))], dim=1)
    place = torch.arccos((2 * (checks - low[:, None]) / (high - low)[:, None] - 1).clamp(-1, 1))
    at_checks = torch.cos(place[:, :, None] * k)
    x = torch.cat([x, checks], dim=1)
    # The slope brings out a kink, which the value shows ever less of as panels shrink.
    with torch.enable_grad():
        points = x.detach().requires_grad_()
        values = fn(points.reshape(-1)).reshape(x.shape).to(torch.float64)
        slopes = torch.zeros_like(x)
        if values.requires_grad:
            (slopes,) = torch.autograd.grad(values.sum(), points)
    values = values.detach()
    # Overflow and the outside of a domain have nothing to resolve; their border is found like a kink.
    undefined = ~(values.isfinite() & slopes.isfinite())
    smooth = torch.ones(len(panels), dtype=torch.bool)
    # What the rounding of u itself may do, of a function that varies within the panel; far below what a kink does.
    rounding = _ORDER * _EPSILON * panels.abs().amax(1) / (high - low)
    for y, tolerance in ((values, _TOLERANCE), (slopes, 100 * _TOLERANCE)):
        y = y.masked_fill(undefined, 0.0)
        y = y / y.abs().amax(1, keepdim=True).clamp(min=max(scale, 1e-300))
        series = y[:, :_ORDER] @ torch.cos(k[:, None] * angles).T * (2 / _ORDER)
        series[:, 0] /= 2
        off = ((at_checks @ series[:, :, None])[:, :, 0] - y[:, _ORDER:]).abs().amax(1)
        noise = (rounding * (y.amax(1) - y.amin(1))).clamp(max=_NOISE)
        smooth &= series[:, -3:].abs().amax(1) <= noise.clamp(min=tolerance)
        smooth &= off <= (10 * noise).clamp(min=1e4 * tolerance)
    return torch.where(undefined.any(1), undefined.all(1), smooth)


def _largest(fn: Function, x: Tensor) -> float:
    return float(_values(fn, x).nan_to_num(0.0, 0.0, 0.0).abs().max()) if len(x) else 0.0


def _values(fn: Function, x: Tensor) -> Tensor:
    with torch.no_grad():
        return fn(x.reshape(-1)).reshape(x.shape).to(torch.float64)
