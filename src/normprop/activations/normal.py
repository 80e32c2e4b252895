"""Integrals of powers against the standard normal density, accurate to the last digits also far in the tails."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normprop.activations.constant import Constant
from normprop.errors import NormPropError

# Beyond this many standard deviations the float64 density is exactly zero.
FAR = 60.0
_DEGREE = 31
_ALPHA = 3.0
_MAX_ORDER = 6


class Expectations(NamedTuple):
    """What u ~ N(mean, std²) becomes on its way through f: E f, Var f, E f², E f'², d E f/d mean, an error bound."""

    mean: Tensor
    var: Tensor
    second: Tensor
    slope: Tensor
    mean_slope: Tensor
    error: Tensor


def has_values(x: Tensor) -> bool:
    """Whether values may be looked at: not while compiling, exporting, under a transform, or on the meta device."""
    if torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, nn.Parameter):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def density(z: Tensor) -> Tensor:
    """φ(z) = exp(−z²/2)/√(2π)."""
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def half_moments(order: int, like: Tensor) -> Tensor:
    """I_n(0) = ½ E|z|ⁿ = 2^{n/2} Γ((n+1)/2) / (2√π) for n = 0 … order."""
    values = [2 ** (n / 2) * math.gamma((n + 1) / 2) / (2 * math.sqrt(math.pi)) for n in range(order + 1)]
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def tail_moments(t: Tensor, order: int) -> Tensor:
    """I_n(t) = ∫_t^∞ (z − t)ⁿ φ(z) dz for n = 0 … order (at most 6), in a new first dimension; t ≥ 0.

    I_n(t) = φ(t) S_n(x) / (t + α)^{n+1} with x = (t − α)/(t + α) in [−1, 1). S_n is smooth and varies slowly, so one
    polynomial in x serves all t, and numbers of nearly equal size are never subtracted (derived). The relative error
    stays below 3e-13, most of it from the rounding of t in exp(−t²/2), wherever the value is a normal float64.

    >>> tail_moments(torch.tensor(0.0, dtype=torch.float64), 2)
    tensor([0.5000, 0.3989, 0.5000], dtype=torch.float64)
    """
    if order > _MAX_ORDER:
        raise NormPropError(f"tail moments are tabulated up to order {_MAX_ORDER}, not {order}")
    t = t.clamp(max=FAR)
    scale = 1 / (t + _ALPHA)
    x = (t - _ALPHA) * scale
    x2 = x * x
    x4 = x2 * x2
    low = torch.stack([torch.ones_like(x), x, x2, x * x2, x4, x4 * x, x4 * x2, x4 * x2 * x])
    table = _TABLE[: order + 1].to(device=t.device, dtype=t.dtype).reshape(-1, 8)
    blocks = (table @ low.reshape(8, -1)).reshape(order + 1, 4, *t.shape)
    x8 = x4 * x4
    smooth = blocks[:, 0] + x8 * (blocks[:, 1] + x8 * (blocks[:, 2] + x8 * blocks[:, 3]))
    decay = [density(t) * scale]
    for _ in range(order):
        decay.append(decay[-1] * scale)
    return smooth * torch.stack(decay)


def tail_ratios(t: Tensor) -> tuple[Tensor, Tensor]:
    """I_0/φ and I_2/I_1 at t ≥ 0, see `tail_moments`: with them nothing is subtracted for the first three.

    As I_{n+1} = n I_{n−1} − t I_n, ``I_1 = I_0 / (t + I_2/I_1)``. Polynomials in x, as there; relative errors below 1e-14.

    >>> tail_ratios(torch.tensor(0.0, dtype=torch.float64))[0] / math.sqrt(math.pi / 2)  # ½ / (1/√(2π))
    tensor(1.0000, dtype=torch.float64)
    """
    t = t.clamp(max=FAR)
    scale = t + _ALPHA
    powers = ((t - _ALPHA) / scale).unsqueeze(-1) ** torch.arange(_DEGREE + 1, dtype=t.dtype, device=t.device)
    first, second = (powers @ _RATIOS.like(t)).unbind(-1)
    return first / scale, second / scale


def gauss_legendre(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss-Legendre rule on [0, 1]."""
    nodes, weights = _LEGENDRE[count]
    return like.new_tensor(nodes), like.new_tensor(weights)


def _legendre(count: int) -> tuple[list[float], list[float]]:
    """By Golub and Welsch, polished by Newton steps on P_n."""
    k = torch.arange(1, count, dtype=torch.float64)
    beta = k / torch.sqrt(4 * k * k - 1)
    x = torch.linalg.eigvalsh(torch.diag(beta, 1) + torch.diag(beta, -1))
    for _ in range(2):
        before, value = torch.ones_like(x), x
        for n in range(2, count + 1):
            before, value = value, ((2 * n - 1) * x * value - (n - 1) * before) / n
        slope = count * (x * value - before) / (x * x - 1)
        x = x - value / slope
    return ((1 + x) / 2).tolist(), (1 / ((1 - x * x) * slope * slope)).tolist()


def _table() -> Tensor:
    """Monomial coefficients of S_n, one row for each n = 0 … 6, and of S_2/S_1, from values at the Chebyshev points."""
    nodes = torch.arange(_DEGREE + 1, dtype=torch.float64)
    angles = math.pi * (nodes + 0.5) / (_DEGREE + 1)
    x = torch.cos(angles)
    values = _scaled_tail(_ALPHA * (1 + x) / (1 - x))
    values = torch.cat([values, values[:, 2:3] / values[:, 1:2]], 1)
    coefficients = 2 / (_DEGREE + 1) * torch.cos(nodes[:, None] * angles) @ values
    coefficients[0] /= 2
    # Row k of `basis` holds the monomial coefficients of T_k, by T_{k+1} = 2x T_k − T_{k−1}.
    basis = torch.zeros(_DEGREE + 1, _DEGREE + 1, dtype=torch.float64)
    basis[0, 0] = basis[1, 1] = 1
    for k in range(2, _DEGREE + 1):
        basis[k, 1:] = 2 * basis[k - 1, :-1]
        basis[k] -= basis[k - 2]
    return (basis.T @ coefficients).T.contiguous()


def _scaled_tail(t: Tensor) -> Tensor:
    """S_n(t) = ∫_0^∞ vⁿ exp(−v t/(t+α) − v²/2(t+α)²) dv by the double-exponential rule: every term is positive."""
    step = 1 / 16
    x = torch.arange(-5.0, 5.0, step, dtype=torch.float64)
    v = torch.exp(x - torch.exp(-x))
    weights = v * (1 + torch.exp(-x)) * step
    shifted = t[:, None] + _ALPHA
    integrand = torch.exp(-v * (t[:, None] / shifted) - (v / shifted) ** 2 / 2)
    powers = v[:, None] ** torch.arange(_MAX_ORDER + 1, dtype=torch.float64)
    return integrand @ (weights[:, None] * powers)


_ALL = _table()
_TABLE, _RATIOS = _ALL[:-1], Constant(_ALL[[0, -1]].T.contiguous())
_LEGENDRE = {count: _legendre(count) for count in (*range(4, 25), 28, 34)}
