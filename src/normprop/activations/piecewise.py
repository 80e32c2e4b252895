"""Moments of a piecewise polynomial of a Gaussian in closed form: one engine for ReLU and its many relatives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normprop.activations.normal import FAR, Expectations, density, gauss_legendre, half_moments, tail_moments

Scalar = float | Tensor

# Divisor in place of a zero std: its square is still a normal number, so neither values nor gradients become NaN.
TINY = 1e-140
# Up to this width (times max(1, distance)) a part is integrated by Gauss-Legendre, beyond it by a difference of tails.
_NARROW = 2.0


@dataclass(frozen=True)
class Polynomial:
    """c0 + c1 (u − origin) + c2 (u − origin)²; coefficients are numbers or tensors that broadcast against the mean."""

    c0: Scalar = 0.0
    c1: Scalar = 0.0
    c2: Scalar = 0.0
    origin: float = 0.0

    def at(self, u: Tensor) -> Tensor:
        """The polynomial's value at u."""
        offset = u - self.origin
        if _is_zero(self.c2):
            return self.c0 + offset * self.c1
        return self.c0 + offset * (self.c1 + offset * self.c2)


@dataclass(frozen=True)
class Piecewise:
    """`pieces[i]` between `knots[i − 1]` and `knots[i]` (ascending); `continuous`: neighbours meet at their knot."""

    pieces: Sequence[Polynomial]
    knots: Sequence[Scalar] = ()
    continuous: bool = True

    def at(self, u: Tensor) -> Tensor:
        """The function's value at u; at a knot, that of the piece before it."""
        value = self.pieces[0].at(u)
        for knot, piece in zip(self.knots, self.pieces[1:], strict=True):
            value = torch.where(u > knot, piece.at(u), value)
        return value


def piecewise_moments(f: Piecewise, mean: Tensor, std: Tensor) -> Expectations:
    """Moments of f(u), u ~ N(mean, std²), for float tensors mean and std of one shape, in closed form (derived)."""
    linear = all(_is_zero(p.c2) for p in f.pieces)
    if linear and f.continuous and len(f.pieces) == 2:
        return _one_kink(f, mean, std)
    return _many_parts(f, mean, std, 2 if linear else 4)


def _one_kink(f: Piecewise, mean: Tensor, std: Tensor) -> Expectations:
    """Two lines that meet: slope p on the mean's side of the knot, q on the other, t standard deviations away.

    With z pointing from the mean to the knot, f − f(mean) = ±std [p z + (q − p)(z − t)_+], and E z (z − t)_+ = I_0(t)
    (Stein), so

        E f = f(mean) ± std (q − p) I_1        Var f = std² [p² + 2p(q − p) I_0 + (q − p)² (I_2 − I_1²)]
        E f'² = p² + (q² − p²) I_0             d E f / d mean = p + (q − p) I_0

    For ReLU at mean 0, std 1 this is Remark 1 of the paper, for PReLU its Remark 2.
    """
    left, right = f.pieces
    s = std.clamp_min(TINY)
    distance = mean - f.knots[0]
    on_right = distance > 0
    a, b = (x.c1 if isinstance(x.c1, Tensor) else mean.new_tensor(x.c1) for x in (left, right))
    p, q = torch.where(on_right, b, a), torch.where(on_right, a, b)
    # Not |distance|, whose derivative at a mean on the knot would be 0.
    i0, i1, i2 = tail_moments(torch.where(on_right, distance, -distance) / s, 2).unbind()
    center = torch.where(on_right, right.at(mean), left.at(mean))
    bend = (b - a).square()
    average = center + (b - a) * s * i1
    var = std.square() * (p * (p + 2 * (q - p) * i0) + bend * (i2 - i1 * i1))
    slope = p * p * (1 - i0) + q * q * i0
    return _packed(average, var, var + average * average, slope, p + (q - p) * i0)


def _many_parts(f: Piecewise, mean: Tensor, std: Tensor, order: int) -> Expectations:
    """Any pieces of degree ≤ 2.

    Every piece is cut at the mean into a part on its right and one on its left, so that each part starts at a
    distance t ≥ 0 from the mean (in units of std) and runs outwards; the left ones are mirrored. On a part, f −
    f(mean) is a polynomial in the distance y from the part's start, and E y^n follows from the tail moments. A second
    moment is a sum over parts of positive terms. Tensors have dimensions [side, piece, …].
    """
    side = mean.new_tensor([1.0, -1.0]).reshape(2, 1, *[1] * mean.dim())
    m, s = side * mean, std.clamp_min(TINY)
    knots = torch.stack([_column(f.knots, mean), -_column(f.knots, mean).flip(0)])
    coefficients = ([getattr(p, name) for p in f.pieces] for name in ("c0", "c1", "c2", "origin"))
    c0, c1, c2, origin = (torch.stack([c, c.flip(0)]) for c in (_column(values, mean) for values in coefficients))
    c1, origin = c1 * side, origin * side

    ahead = _ahead(knots, m)
    parts = _part_moments(knots, ahead, m, s, order)
    start = torch.cat([m, torch.where(ahead, knots, m)], dim=1)
    offset = start - origin
    value = c0 + offset * (c1 + offset * c2)
    center = f.at(mean)
    moved = value - center
    tilt = c1 + 2 * offset * c2
    d1, d2 = tilt * s, c2 * s * s

    def expect(*polynomial: Tensor) -> Tensor:
        terms = [a * y for a, y in zip(polynomial, parts, strict=False)]
        return torch.stack(terms).sum((0, 1, 2))

    def square(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        low = (a * a, 2 * a * b, b * b)
        return low if order == 2 else (*low[:2], low[2] + 2 * a * c, 2 * b * c, c * c)

    shift = expect(moved, d1, d2) if order == 4 else expect(moved, d1)
    average = center + shift
    var = torch.where(std > 0, expect(*square(moved, d1, d2)) - shift * shift, 0.0)
    second = var + average * average
    if order == 2:
        slope, mean_slope = expect(tilt * tilt), expect(side * tilt)
    else:
        bend = 2 * c2 * s
        slope, mean_slope = expect(tilt * tilt, 2 * tilt * bend, bend * bend), expect(side * tilt, side * bend)
    if not f.continuous:
        for knot, left, right in zip(f.knots, f.pieces, f.pieces[1:], strict=False):
            place = knot.to(mean) if isinstance(knot, Tensor) else mean.new_tensor(knot)
            jump = right.at(place) - left.at(place)
            mean_slope = mean_slope + jump * density(((knot - mean) / s).clamp(-FAR, FAR)) / s
            slope = torch.where(jump != 0, math.inf, slope)
    return _packed(average, var, second, slope, mean_slope)


def _ahead(knots: Tensor, m: Tensor) -> Tensor:
    """Which knots lie outwards of the mean; one at the mean counts as on its right, in derivatives, too."""
    gap = knots - m
    return torch.stack([gap[0] >= 0, gap[1] > 0])


def _part_moments(knots: Tensor, ahead: Tensor, m: Tensor, s: Tensor, order: int) -> Tensor:
    """∫ y^n φ over every part, [n, side, piece, …]."""
    at_mean = half_moments(order, m).reshape(-1, *[1] * m.dim()).expand(order + 1, *m.shape)
    if knots.shape[1] == 0:
        return at_mean
    t = (torch.where(ahead, knots - m, 0.0) / s).clamp(max=FAR)
    begin = torch.cat([m, torch.where(ahead, knots, m)[:, :-1]], dim=1)
    # From the knots themselves, not from t, so that no digits are lost.
    width = (torch.where(ahead, knots - begin, 0.0) / s).clamp(max=2 * FAR)
    tails = tail_moments(t, order)
    starts = torch.cat([at_mean, tails], dim=2)
    inner = starts[:, :, :-1] - _shifted(tails, width)
    inner = torch.where(ahead, inner, 0.0)
    if knots.shape[1] > 1:
        # Only a piece that ends on both sides can be narrow as a whole.
        t, width = t[:, :-1], width[:, 1:]
        wide = width * t.clamp(min=1.0) > _NARROW
        careful = torch.where(wide, inner[:, :, 1:], _narrow(t, width.clamp(max=2 * _NARROW), order))
        inner = torch.cat([inner[:, :, :1], careful], dim=2)
    return torch.cat([inner, starts[:, :, -1:]], dim=2)


def _shifted(tails: Tensor, width: Tensor) -> Tensor:
    """∫_end^∞ (z − end + width)^n φ dz = Σ_k C(n, k) width^{n−k} I_k(end), by repeated Horner steps."""
    rows = list(tails.unbind())
    for low in range(1, len(rows)):
        for n in range(len(rows) - 1, low - 1, -1):
            rows[n] = rows[n] + width * rows[n - 1]
    return torch.stack(rows)


def _narrow(start: Tensor, width: Tensor, order: int) -> Tensor:
    """∫_0^width y^n φ(start + y) dy by Gauss-Legendre on 16 nodes."""
    nodes, weights = gauss_legendre(16, start)
    n = torch.arange(order + 1, device=start.device)
    y = width * nodes.reshape(-1, *[1] * start.dim())
    values = density(start + y).reshape(16, -1)
    unit = ((weights * nodes ** n[:, None]) @ values).reshape(-1, *start.shape)
    powers = [width]
    for _ in range(order):
        powers.append(powers[-1] * width)
    return unit * torch.stack(powers)


def _packed(mean: Tensor, var: Tensor, second: Tensor, slope: Tensor, mean_slope: Tensor) -> Expectations:
    size = mean.abs() + second + torch.where(slope.isinf(), 0.0, slope)
    return Expectations(mean, var, second, slope, mean_slope, 1e-12 * size.detach())


def _column(values: Sequence[Scalar], like: Tensor) -> Tensor:
    """Numbers or tensors as one tensor [len(values), …] that broadcasts against `like`."""
    if any(isinstance(v, Tensor) for v in values):
        tensors = [v.to(like) if isinstance(v, Tensor) else like.new_tensor(v) for v in values]
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        column = torch.stack([t.expand(shape) for t in tensors])
        return column.reshape(len(values), *[1] * (like.dim() - column.dim() + 1), *column.shape[1:])
    return like.new_tensor(values).reshape(-1, *[1] * like.dim())


def _is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0
