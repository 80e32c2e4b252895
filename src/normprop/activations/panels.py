"""Gauss-Legendre panels for a moment lane: few nodes for each channel, placed in closed form around where f bends."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normprop.activations.catalogue import known_form
from normprop.activations.constant import Constant
from normprop.activations.normal import gauss_legendre
from normprop.activations.piecewise import Piecewise
from normprop.activations.smooth_forms import Smooth

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Precision:
    """How far the panels reach, in standard deviations, and their nodes: beside a bend, and in wide panels."""

    reach: float
    near: int
    wide: int


DOUBLE = Precision(8.0, 28, 34)  # 1e-10 of the natural scale for all means and stds from 1e-3 to 1e3
SINGLE = Precision(6.5, 16, 22)  # 1e-6


@dataclass(frozen=True)
class Panels:
    """Nodes of one activation.

    Attributes:
        ends: mean and std ``(n,)`` → ends of the panels in standard deviations from the mean, ``(n, ends)``.
        places: ends → nodes, ``(ends, nodes)``, wherever they are needed.
        widths: ends → weights of the nodes without the density, ``(ends, nodes)``.
        center: f at the means, ``(n,)`` → ``(n,)``.
        value: f at the nodes, ``(n, nodes)`` → ``(n, nodes)``.
        slope: f' at the nodes.
        kinked: whether f' jumps anywhere but at 0.
        form: of the activation.
        rules: nodes of each panel between its ends, in [0, 1], and their weights.
        reach: where the outer panels end.
    """

    ends: Callable[[Tensor, Tensor], Tensor]
    places: Constant
    widths: Constant
    center: Function
    value: Function
    slope: Function
    kinked: bool
    form: Smooth | Piecewise
    rules: Sequence[tuple[Tensor, Tensor]]
    reach: float

    @property
    def count(self) -> int:
        """How many nodes there are."""
        return sum(len(nodes) for nodes, _ in self.rules)

    def smallest(self, rounding: float) -> tuple[float, float]:
        """a, b: below ``a (|m| + |f(m)|) + b`` a standard deviation counts as that (see `fast_moments`)."""
        return rounding ** (1 / 2 if self.kinked else 1 / 3), rounding ** (2 / 3)

    def nodes(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes z in standard deviations from the mean and their weights under N(0, 1), ``(n, nodes)`` each."""
        ends = self.ends(mean, std)
        z = ends @ self.places.like(ends)
        weight = z.square().mul_(-0.5).exp_().mul_(ends @ self.widths.like(ends))
        return z, weight


@functools.lru_cache(maxsize=256)
def lane_panels(name: str, parameters: tuple[tuple[str, Any], ...], precision: Precision) -> Panels | None:
    """Panels of a named activation, if it is smooth or a continuous piecewise polynomial and nothing in it is learned.

    Args:
        name: as for `activation_moments`.
        parameters: of the activation, hashable.
        precision: `DOUBLE` or `SINGLE`.
    """
    # Kept for all later calls: on no device that happens to be the default now, and fit for gradients.
    with torch.device("cpu"), torch.inference_mode(False):
        form = known_form(name, dict(parameters))
        if isinstance(form, Smooth) and not form.algebraic:
            return _smooth_panels(form, precision)
        if isinstance(form, Piecewise) and form.knots and form.continuous:
            return _piecewise_panels(form, precision)
        return None


def _smooth_panels(f: Smooth, precision: Precision) -> Panels:
    """Two panels on each side of 0, where f bends.

    The inner one lies within two standard deviations and within the reach of the bend, its nodes at the squares of
    Gauss-Legendre's, closer and closer to 0; the outer one goes to the end.
    """
    reach, bend = precision.reach, f.scale * f.straight

    def ends(mean: Tensor, std: Tensor) -> Tensor:
        zero = (-mean / std).clamp(-reach, reach)
        inner = (bend / std).clamp(max=2.0)
        last = torch.full_like(zero, reach)
        return torch.stack([-last, (zero - inner).clamp(min=-reach), zero, (zero + inner).clamp(max=reach), last], -1)

    wide, near = _legendre(precision.wide), _legendre(precision.near)
    graded = near[0].square(), 2 * near[0] * near[1]
    mirrored = (1 - graded[0]).flip(0), graded[1].flip(0)
    rules = [wide, mirrored, graded, wide]
    return Panels(ends, *_matrices(rules), f.value, f.value, f.slope, False, f, rules, reach)


def _piecewise_panels(f: Piecewise, precision: Precision) -> Panels:
    """One panel a piece: a polynomial for each column of nodes."""
    reach = precision.reach
    rule = _legendre(precision.wide)

    def ends(mean: Tensor, std: Tensor) -> Tensor:
        last = torch.full_like(mean, reach)
        return torch.stack([-last, *(((k - mean) / std).clamp(-reach, reach) for k in f.knots), last], -1)

    def column(which: str) -> Tensor:
        return torch.tensor([getattr(p, which) for p in f.pieces], dtype=torch.float64).repeat_interleave(precision.wide)

    columns = [column(which) for which in ("c0", "c1", "c2", "origin")]
    c0, c1, c2, origin = map(Constant, columns)
    curved = bool(columns[2].any())
    tilt = Constant(columns[1] - 2 * columns[2] * columns[3])
    base = Constant(columns[0] - columns[3] * (columns[1] - columns[2] * columns[3]))
    bend = Constant(2 * columns[2])

    def value(u: Tensor) -> Tensor:
        if not curved:
            return torch.addcmul(base.like(u), u, tilt.like(u))
        offset = u - origin.like(u)
        return torch.addcmul(c1.like(u), offset, c2.like(u)).mul_(offset).add_(c0.like(u))

    def slope(u: Tensor) -> Tensor:
        return torch.addcmul(tilt.like(u), u, bend.like(u)) if curved else tilt.like(u).expand_as(u).clone()

    rules = [rule] * len(f.pieces)
    return Panels(ends, *_matrices(rules), f.at, value, slope, True, f, rules, reach)


def _legendre(count: int) -> tuple[Tensor, Tensor]:
    return gauss_legendre(count, torch.zeros((), dtype=torch.float64))


def _matrices(rules: Sequence[tuple[Tensor, Tensor]]) -> tuple[Constant, Constant]:
    """`places` and `widths` for one rule on [0, 1] between any two neighbouring ends; 1/√(2π) is in the weights."""
    count = sum(len(nodes) for nodes, _ in rules)
    places, widths = torch.zeros(2, len(rules) + 1, count, dtype=torch.float64).unbind()
    start = 0
    for i, (nodes, weights) in enumerate(rules):
        columns = slice(start, start := start + len(nodes))
        places[i, columns], places[i + 1, columns] = 1 - nodes, nodes
        density = weights / math.sqrt(2 * math.pi)
        widths[i, columns], widths[i + 1, columns] = -density, density
    return Constant(places), Constant(widths)
