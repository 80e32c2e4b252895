"""Where the inside of a function passes numbers that matter, read from the operations of torch that it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Function = Callable[[Tensor], Tensor]
Traces = Mapping[tuple[int, int], Tensor]

# Elementary functions bend and level off at such arguments.
_LEVELS = (0.0, 1.0, -1.0, 8.0, -8.0)
# What bends nowhere, wherever its arguments are.
_STRAIGHT = frozenset(
    "add sub mul neg add_ sub_ mul_ neg_ __radd__ __rsub__ __rmul__ rsub multiply subtract negative addcmul clone detach to "
    "float double type type_as reshape view flatten unsqueeze squeeze contiguous __getitem__ zeros_like ones_like full_like "
    "logical_and logical_or logical_not logical_xor __and__ __or__ __invert__".split()
)
# What bends at the numbers that it is given, or else at 0, and is straight elsewhere.
_BENT = frozenset(
    "relu relu_ abs abs_ clamp clamp_ clamp_min clamp_max clip gt ge lt le greater less greater_equal less_equal sign "
    "maximum minimum max min threshold _threshold hardtanh heaviside where masked_fill masked_fill_".split()
)
# What is straight in all of its arguments but one, and the place of that one.
_BENT_IN = dict.fromkeys("div div_ true_divide divide masked_fill masked_fill_".split(), 1) | {"where": 0}
# A trace that changes its sign more often is a wave; the panels have to follow it by themselves.
_MOST = 48
# Closer to 0 than this, a place is 0.
_NOTHING = 1e-30
_GOLDEN = (math.sqrt(5) - 1) / 2


class Crossings(NamedTuple):
    """Places where an intermediate value of a function passes a number that its operations tell apart.

    points: ascending. seen: whether every step was one of torch's; a function that computes elsewhere hides its bends.
    """

    points: tuple[float, ...]
    seen: bool


def find_crossings(fn: Function, low: float, high: float) -> Crossings:
    """Candidates for kinks, jumps and narrow features of an elementwise fn, from what runs inside it.

    An operation bends where its argument passes 0, a number that it was given, or another of its arguments, and a smooth
    one within a few units of 0. The places are found to the last digit by sign changes, however close they are: those of
    ``exp(−((u − c)/w)²)`` are c, c ± w, c ± 8w and two in between. Extrema of arguments are found as well.

    Args:
        fn: takes float64 tensors of any shape.
        low: where to begin.
        high: where to end.

    >>> find_crossings(lambda x: torch.where(x > 100, x.tanh(), x), -1e3, 1e3).points
    (-8.0, -1.0, 0.0, 1.0, 8.0, 100.0)
    """
    points: set[float] = set()
    seen = True
    for _ in range(3):  # a feature within a feature shows once the outer one has points
        grid = _grid(low, high, sorted(points))
        watch = _Watch(fn, grid)
        seen = seen and watch.seen
        new = set(_roots(fn, grid, watch.traces))
        new |= {x for x in _extrema(fn, grid, watch.arguments) if not _near(x, new | points)}
        new = {x for x in new if low < x < high} - points
        points |= new
        if not new:
            break
    return Crossings(tuple(sorted(points)), seen)


def _grid(low: float, high: float, points: list[float]) -> Tensor:
    """Evenly spaced, evenly in magnitude, and close to points that are known: between them and on both sides."""
    far = math.log2(max(abs(low), abs(high), 1.0))
    sizes = torch.logspace(-30, far, int(4 * (far + 30)) + 1, base=2.0, dtype=torch.float64)
    given = torch.tensor(points or [0.0], dtype=torch.float64)
    gaps = given.diff().clamp(max=1e3)
    between = [given[:-1] + share * gaps for share in (0.03, 0.3, 0.5)] + [given[1:] - share * gaps for share in (0.03, 0.3)]
    step = 1e-6 * given.abs().clamp(min=1e-6)
    every = [torch.linspace(low, high, 401, dtype=torch.float64), -sizes, sizes, given - step, given, given + step, *between]
    grid: Tensor = torch.cat(every).clamp(low, high).unique()
    return grid


class _Watch(TorchFunctionMode):
    """One run of a function.

    Attributes:
        traces: values whose sign changes matter, by call and number within the call: the same keys in every run.
        arguments: those of them that are an argument itself.
        seen: whether the result was made by operations that were seen.
    """

    def __init__(self, fn: Function, u: Tensor) -> None:
        super().__init__()
        u = u.clone()
        self.size = u.numel()
        self.data: dict[int, Tensor] = {id(u): u}
        self.made: dict[int, Tensor] = {}
        self.calls = 0
        self.traces: dict[tuple[int, int], Tensor] = {}
        self.arguments: dict[tuple[int, int], Tensor] = {}
        self.seen = True
        with torch.no_grad(), self:
            result = fn(u)
        self.seen = self.seen and id(result) in self.data

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in pytree.tree_leaves((args, kwargs or {})) if isinstance(a, Tensor)]
        data = any(id(t) in self.data for t in tensors)
        self.seen &= all(t.numel() != self.size or id(t) in self.made or id(t) in self.data for t in tensors)
        if data:
            self._note(getattr(func, "__name__", ""), args, kwargs or {})
        self.calls += 1
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                (self.data if data else self.made)[id(tensor)] = tensor
        return result

    def _note(self, name: str, args: Any, kwargs: Any) -> None:
        """Differences between an operation's arguments and the numbers at which it may bend."""
        if name in _STRAIGHT:
            return
        place = _BENT_IN.get(name)
        given = pytree.tree_leaves((args, kwargs) if place is None else args[place : place + 1])
        values = [a for a in given if isinstance(a, Tensor) and id(a) in self.data and a.numel() == self.size]
        values = [t.detach().reshape(-1).to(torch.float64) for t in values]
        numbers = {float(a) for a in given if isinstance(a, int | float)}
        numbers |= {float(a) for a in given if isinstance(a, Tensor) and id(a) not in self.data and a.numel() == 1}
        levels = (numbers or {0.0}) if name in _BENT else {*_LEVELS, *numbers, *(-c for c in numbers)}
        found: list[Tensor] = []
        for i, value in enumerate(values):
            if name not in _BENT:
                self.arguments[self.calls, len(found)] = value
            found += (value - level for level in sorted(levels, key=abs))
            found += (value - other for other in values[i + 1 :])
        self.traces.update(((self.calls, i), trace) for i, trace in enumerate(found))


def _roots(fn: Function, grid: Tensor, traces: Traces) -> Iterator[float]:
    """Where traces change their sign, by bisection of all changes at once."""
    brackets: set[tuple[tuple[int, int], float, float]] = set()
    for key, trace in traces.items():
        above = trace > 0
        at = (above[1:] != above[:-1]).nonzero().flatten()
        if len(at) <= _MOST:
            brackets |= {(key, a, b) for a, b in zip(grid[at].tolist(), grid[at + 1].tolist(), strict=True)}
    keys, a, b = _columns(brackets)
    above = _at(fn, a, keys) > 0
    for _ in range(220):
        middle = a + (b - a) / 2
        inside = (middle > a) & (middle < b) & (b - a > _NOTHING)
        if not bool(inside.any()):
            break
        same = (_at(fn, middle, keys) > 0) == above
        a, b = torch.where(inside & same, middle, a), torch.where(inside & ~same, middle, b)
    yield from (0.0 if abs(x) < _NOTHING else roundest(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True))


def _extrema(fn: Function, grid: Tensor, arguments: Traces) -> Iterator[float]:
    """Where arguments turn, by golden sections of all turns at once."""
    brackets: set[tuple[tuple[int, int], float, float]] = set()
    for key, value in arguments.items():
        slope = value.diff()
        at = ((slope[1:] > 0) & (slope[:-1] < 0) | (slope[1:] < 0) & (slope[:-1] > 0)).nonzero().flatten()
        if len(at) <= _MOST:
            brackets |= {(key, a, b) for a, b in zip(grid[at].tolist(), grid[at + 2].tolist(), strict=True)}
    keys, a, b = _columns(brackets)
    ends = torch.stack([_at(fn, a, keys), _at(fn, b, keys)])
    down = _at(fn, a + (b - a) / 2, keys) < ends.amin(0)
    for _ in range(60 if keys else 0):
        c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
        left = (_at(fn, c, keys) < _at(fn, d, keys)) == down
        a, b = torch.where(left, a, c), torch.where(left, d, b)
    depth = (_at(fn, a, keys) - torch.where(down, ends.amin(0), ends.amax(0))).abs()
    deep = depth > 1e-9 * ends.abs().amax(0).clamp(min=1.0)  # and no rounding
    yield from (0.0 if abs(x) < 1e-9 else x for x in a[deep].tolist())


def _near(x: float, points: set[float]) -> bool:
    """Whether an extremum, which is found to half the digits, is known."""
    return any(abs(x - point) < 1e-7 * max(abs(x), 1e-2) for point in points)


def _columns(brackets: set[tuple[tuple[int, int], float, float]]) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    rows = sorted(brackets)
    low, high = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (1, 2))
    return [key for key, *_ in rows], low, high


def _at(fn: Function, u: Tensor, keys: list[tuple[int, int]]) -> Tensor:
    """The trace of each key at its own place."""
    if not keys:
        return u
    found = _Watch(fn, torch.cat([u, u[:1], u[:1]])).traces  # three at least, so that one number is told from them
    none = torch.full_like(u, math.nan)
    return torch.stack([found.get(key, none)[i] for i, key in enumerate(keys)])


def roundest(a: float, b: float) -> float:
    """Of the few numbers from a to b the one that is shortest to write, which is most likely the one meant."""
    candidates = [a]
    while candidates[-1] < b and len(candidates) < 32:
        candidates.append(math.nextafter(candidates[-1], b))
    return 0.0 if a <= 0 <= b else min(candidates, key=lambda x: len(repr(x)))
