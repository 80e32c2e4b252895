"""The smooth activations without a closed form, each with a slope that keeps its digits in the tails."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.activations.normal import density, gauss_legendre
from normprop.errors import NormPropError

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Smooth:
    """A continuous function that bends around 0.

    value, slope: f and f'. rate: a bound on |d log f'² / du| at the mean, which tells how far from the mean the mass
    of f'² φ may lie. scale: how far from 0 the bend reaches. algebraic: whether f approaches its asymptotes only as a
    power of u. straight: beyond that many scales, f differs from its asymptotes by 1e-10 at most. code: the function's
    name in curves.c, with its numbers; empty if it isn't there.
    """

    value: Function
    slope: Function
    rate: Function
    scale: float = 1.0
    algebraic: bool = False
    straight: float = 24.0
    code: tuple[str | float, ...] = ()

    @property
    def points(self) -> list[float]:
        """Panel ends: 0 and a ladder of powers of two, both ways."""
        ladder = [self.scale * 2.0**k for k in range(-1, 14 if self.algebraic else 6)]
        return [-x for x in reversed(ladder)] + [0.0] + ladder


def _constant(rate: float) -> Function:
    return lambda mean: torch.full_like(mean, rate)


def _bell(u: Tensor) -> Tensor:
    return torch.sigmoid(u) * torch.sigmoid(-u)


def sigmoid() -> Smooth:
    """σ(u) = 1/(1 + e^{−u})."""
    return Smooth(torch.sigmoid, _bell, _constant(2.0), code=("SIGMOID",))


def tanh() -> Smooth:
    """tanh u; its slope is 4σ(2u)σ(−2u), which unlike 1 − tanh² keeps its digits."""
    return Smooth(torch.tanh, lambda u: 4 * _bell(2 * u), _constant(4.0), straight=12.0, code=("TANH",))


def silu() -> Smooth:
    """u σ(u)."""
    return Smooth(F.silu, lambda u: torch.sigmoid(u) * (1 + u * torch.sigmoid(-u)), _constant(2.0), code=("SILU",))


def mish() -> Smooth:
    """u tanh(log(1 + eᵘ))."""

    def slope(u: Tensor) -> Tensor:
        w = F.softplus(u)
        return torch.tanh(w) + u * torch.sigmoid(u) * 4 * _bell(2 * w)

    return Smooth(F.mish, slope, _constant(2.0), code=("MISH",))


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Smooth:
    """log(1 + e^{βu})/β; torch's switch to u beyond threshold/β, which is e^{−threshold}/β wide, is left out."""
    if threshold < 15:
        raise NormPropError(f"softplus: at threshold {threshold} it jumps visibly; pass it as a callable")
    value: Function = lambda u: F.softplus(u, beta, 40.0)
    return Smooth(value, lambda u: torch.sigmoid(beta * u), _constant(2 * beta), 1 / beta, code=("SOFTPLUS", beta))


def logsigmoid() -> Smooth:
    """log σ(u)."""
    return Smooth(F.logsigmoid, lambda u: torch.sigmoid(-u), _constant(2.0))


def elu(alpha: float = 1.0) -> Smooth:
    """u above 0, α(eᵘ − 1) below."""
    return _exponential(1.0, alpha, 1.0)


def celu(alpha: float = 1.0) -> Smooth:
    """u above 0, α(e^{u/α} − 1) below."""
    return _exponential(1.0, alpha, alpha)


def selu() -> Smooth:
    """ELU with the scale and α that make (0, 1) a fixed point of mean and variance."""
    return _exponential(1.0507009873554804934193349852946, 1.6732632423543772848170429916717, 1.0)


def _exponential(scale: float, alpha: float, width: float) -> Smooth:
    def value(u: Tensor) -> Tensor:
        return scale * torch.where(u > 0, u, alpha * torch.expm1(u.clamp(max=0) / width))

    def slope(u: Tensor) -> Tensor:
        return scale * torch.where(u > 0, 1.0, alpha / width * torch.exp(u.clamp(max=0) / width))

    return Smooth(value, slope, _constant(2 / width), width, code=("EXPONENTIAL", scale, alpha, width))


def gelu(approximate: str = "none") -> Smooth:
    """u Φ(u), or with approximate="tanh" u σ(2√(2/π)(u + 0.044715 u³))."""
    if approximate == "none":
        rate: Function = lambda mean: 2 * mean.abs() + 2
        slope: Function = lambda u: _normal(u) + u * density(u)
        return Smooth(lambda u: u * _normal(u), slope, rate, straight=8.0, code=("GELU",))
    if approximate != "tanh":
        raise NormPropError(f"gelu: approximate must be 'none' or 'tanh', not {approximate!r}")
    c, cubic = 2 * math.sqrt(2 / math.pi), 0.044715

    def gate(u: Tensor) -> Tensor:
        return c * u * (1 + cubic * u * u)

    def bent(u: Tensor) -> Tensor:
        w = gate(u)
        return torch.sigmoid(w) * (1 + u * c * (1 + 3 * cubic * u * u) * torch.sigmoid(-w))

    steepest: Function = lambda mean: 2 * c * (1 + 3 * cubic * mean * mean)
    return Smooth(lambda u: u * torch.sigmoid(gate(u)), bent, steepest, straight=8.0, code=("GELU_TANH",))


def erf() -> Smooth:
    """2/√π ∫_0^u e^{−x²} dx."""
    return Smooth(torch.erf, _erf_slope, lambda mean: 4 * mean.abs() + 2, 0.5, straight=10.0)


def erfc() -> Smooth:
    """1 − erf u."""
    return Smooth(torch.erfc, lambda u: -_erf_slope(u), lambda mean: 4 * mean.abs() + 2, 0.5, straight=10.0)


def softsign() -> Smooth:
    """u/(1 + |u|)."""
    return Smooth(F.softsign, lambda u: (1 + u.abs()).square().reciprocal(), _constant(4.0), algebraic=True)


def tanhshrink() -> Smooth:
    """u − tanh u, near 0 as the integral of its slope tanh² u."""

    def value(u: Tensor) -> Tensor:
        nodes, weights = gauss_legendre(12, u)
        near = (torch.tanh(u.clamp(-1, 1)[..., None] * nodes).square() * weights).sum(-1) * u
        return torch.where(u.abs() < 1, near, u - torch.tanh(u))

    return Smooth(value, lambda u: torch.tanh(u).square(), _constant(4.0), straight=12.0)


def _normal(u: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-u / math.sqrt(2))


def _erf_slope(u: Tensor) -> Tensor:
    return 2 / math.sqrt(math.pi) * torch.exp(-u * u)
