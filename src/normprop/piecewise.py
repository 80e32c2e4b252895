"""Moments of a piecewise polynomial of a Gaussian in closed form: one engine for ReLU and its many relatives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from normprop.gaussian import FAR, Expectations, density, half_moments, tail_moments

Scalar = float | Tensor

_NARROW = 2.0


@dataclass(frozen=True)
class Polynomial:
    """c0 + c1 (u − origin) + c2 (u − origin)²; coefficients are numbers or tensors that broadcast against the mean."""

    c0: Scalar = 0.0
    c1: Scalar = 0.0
    c2: Scalar = 0.0
    origin: Scalar = 0.0


@dataclass(frozen=True)
class Piecewise:
    """`pieces[i]` between `knots[i − 1]` and `knots[i]` (ascending); `continuous` promises that neighbours meet at their knot."""

    pieces: Sequence[Polynomial]
    knots: Sequence[Scalar] = ()
    continuous: bool = True


def piecewise_moments(f: Piecewise, mean: Tensor, std: Tensor) -> Expectations:
    """Moments of f(u), u ~ N(mean, std²), for float tensors mean and std of one shape (derived).

    Every piece is cut at the mean into a part on its right and one on its left, so that each part starts at a distance t ≥ 0 from
    the mean (in units of std) and runs outwards. On a part f − f(mean) is a polynomial in the distance y from the part's start, and
    E y^n is a difference of the tail moments I_n, taken by Gauss-Legendre where the part is too narrow for a difference. All
    second moments are sums of positive terms, so none of them cancels.
    """
    quadratic = any(not _is_zero(p.c2) for p in f.pieces)
    order = 4 if quadratic else 2
    side = torch.tensor([[1.0], [-1.0]], dtype=mean.dtype, device=mean.device)
    c0, c1, c2, origin = (_both_sides(f, name, mean) for name in ("c0", "c1", "c2", "origin"))
    c1, origin = c1 * side, origin * side
    m = mean[..., None, None] * side
    s = std[..., None, None]
    knots = _both_knots(f, mean) * side

    parts = _part_moments(knots, m, s, order)
    start = m.expand(c0.shape[:-1] + (len(f.pieces),)) if knots.shape[-1] == 0 else _anchors(knots, m)
    offset = start - origin
    value = c0 + offset * (c1 + offset * c2)
    d1 = (c1 + 2 * offset * c2) * s
    d2 = c2 * s * s
    center = _value_at_mean(f, mean)
    moved = value - center[..., None, None]

    def expect(*coefficients: Tensor) -> Tensor:
        return (torch.stack(coefficients, dim=-1) * parts[..., : len(coefficients)]).sum((-3, -2, -1))

    if quadratic:
        shift = expect(moved, d1, d2)
        spread = expect(moved * moved, 2 * moved * d1, d1 * d1 + 2 * moved * d2, 2 * d1 * d2, d2 * d2)
        second = expect(value * value, 2 * value * d1, d1 * d1 + 2 * value * d2, 2 * d1 * d2, d2 * d2)
    else:
        shift = expect(moved, d1)
        spread = expect(moved * moved, 2 * moved * d1, d1 * d1)
        second = expect(value * value, 2 * value * d1, d1 * d1)
    e1, e2 = c1 + 2 * offset * c2, 2 * c2 * s
    slope = expect(e1 * e1, 2 * e1 * e2, e2 * e2)
    mean_slope = expect(side * e1, side * e2)
    if not f.continuous:
        for knot, left, right in zip(f.knots, f.pieces, f.pieces[1:], strict=False):
            k = _tensor(knot, mean)
            jump = _evaluate(right, k) - _evaluate(left, k)
            z = ((k - mean) / std.clamp_min(1e-140)).clamp(-FAR, FAR)
            mean_slope = mean_slope + jump * density(z) / std.clamp_min(1e-140)
            slope = torch.where(jump != 0, math.inf, slope)
    mean_out = center + shift
    error = 1e-13 * (mean_out.abs() + second + torch.where(slope.isinf(), 0.0, slope)).detach()
    return Expectations(mean_out, spread - shift * shift, second, slope, mean_slope, error)


def _part_moments(knots: Tensor, m: Tensor, s: Tensor, order: int) -> Tensor:
    """E y^n over each part, [..., 2 sides, pieces, order + 1]."""
    safe = s.clamp_min(1e-140)
    at_mean = half_moments(order, m).expand(torch.broadcast_shapes(m.shape[:-1], s.shape[:-1]) + (1, order + 1))
    if knots.shape[-1] == 0:
        return at_mean
    t = (torch.relu(knots - m) / safe).clamp(max=FAR)
    tails = tail_moments(t, order)
    width = _widths(knots, m, safe)
    starts = torch.cat([at_mean, tails], dim=-2)
    inner = starts[..., :-1, :] - _shifted(tails, width.clamp(max=2 * FAR), order)
    inner = torch.where(width[..., None] > 0, inner, 0.0)
    if knots.shape[-1] > 1:
        # Only pieces that end on both sides can be narrow altogether.
        begin, w = t[..., :-1], width[..., 1:]
        narrow = (w * begin.clamp(min=1.0) < _NARROW)[..., None]
        careful = torch.where(narrow, _narrow(begin, w.clamp(max=2 * _NARROW), order), inner[..., 1:, :])
        inner = torch.cat([inner[..., :1, :], careful], dim=-2)
    return torch.cat([inner, starts[..., -1:, :]], dim=-2)


def _widths(knots: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Width of every part but the last, in units of std, taken from the knots themselves so that no digits are lost."""
    begin = torch.cat([m.expand(knots.shape[:-1] + (1,)), torch.maximum(knots, m)[..., :-1]], dim=-1)
    return torch.relu(knots - begin) / s


def _shifted(tails: Tensor, width: Tensor, order: int) -> Tensor:
    """∫_end^∞ (z − end + width)^n φ dz = Σ_k C(n, k) width^{n−k} I_k(end)."""
    powers = [torch.ones_like(width)]
    for _ in range(order):
        powers.append(powers[-1] * width)
    rows = []
    for n in range(order + 1):
        terms = [math.comb(n, k) * powers[n - k] * tails[..., k] for k in range(n + 1)]
        rows.append(sum(terms[1:], terms[0]))
    return torch.stack(rows, dim=-1)


def _narrow(start: Tensor, width: Tensor, order: int) -> Tensor:
    """∫_0^width y^n φ(start + y) dy by Gauss-Legendre on 16 nodes."""
    nodes, weights = (torch.tensor(x, dtype=start.dtype, device=start.device) for x in unit_gauss_legendre(16))
    values = density(start[..., None] + width[..., None] * nodes)
    n = torch.arange(order + 1, device=start.device)
    return values @ (weights[:, None] * nodes[:, None] ** n) * width[..., None] ** (n + 1)


@cache
def unit_gauss_legendre(count: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of the Gauss-Legendre rule on [0, 1], by Golub and Welsch."""
    k = torch.arange(1, count, dtype=torch.float64)
    beta = k / torch.sqrt(4 * k * k - 1)
    values, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return ((values + 1) / 2).tolist(), (vectors[0] ** 2).tolist()


def _anchors(knots: Tensor, m: Tensor) -> Tensor:
    """Where each part starts: the point of its piece that is nearest the mean, on this side of it."""
    first = m.expand(knots.shape[:-1] + (1,))
    return torch.cat([first, torch.maximum(knots, m)], dim=-1)


def _both_sides(f: Piecewise, name: str, like: Tensor) -> Tensor:
    values = torch.stack(torch.broadcast_tensors(*(_tensor(getattr(p, name), like) for p in f.pieces)), dim=-1)
    return torch.stack([values, values.flip(-1)], dim=-2)


def _both_knots(f: Piecewise, like: Tensor) -> Tensor:
    if not f.knots:
        return like.new_zeros(2, 0)
    values = torch.stack(torch.broadcast_tensors(*(_tensor(k, like) for k in f.knots)), dim=-1)
    values = torch.stack([values, values.flip(-1)], dim=-2)
    return values.expand(torch.broadcast_shapes(values.shape[:-2], like.shape) + values.shape[-2:])


def _value_at_mean(f: Piecewise, mean: Tensor) -> Tensor:
    value = _evaluate(f.pieces[0], mean)
    for knot, piece in zip(f.knots, f.pieces[1:], strict=True):
        value = torch.where(mean > knot, _evaluate(piece, mean), value)
    return value


def _evaluate(p: Polynomial, u: Tensor) -> Tensor:
    offset = u - p.origin
    return p.c0 + offset * (p.c1 + offset * p.c2)


def _tensor(value: Scalar, like: Tensor) -> Tensor:
    return value.to(like) if isinstance(value, Tensor) else like.new_tensor(value)


def _is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0
