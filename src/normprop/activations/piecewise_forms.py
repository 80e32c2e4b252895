"""The activations that are piecewise polynomials, as pieces and knots; parameters as in torch.nn.functional."""

import torch
from torch import Tensor

from normprop.activations.piecewise import Piecewise, Polynomial, Scalar
from normprop.errors import NormPropError

_ZERO = Polynomial()
_LINE = Polynomial(c1=1.0)


def identity() -> Piecewise:
    """u."""
    return Piecewise([_LINE])


def neg() -> Piecewise:
    """−u."""
    return Piecewise([Polynomial(c1=-1.0)])


def square() -> Piecewise:
    """u²."""
    return Piecewise([Polynomial(c2=1.0)])


def relu() -> Piecewise:
    """max(u, 0)."""
    return Piecewise([_ZERO, _LINE], [0.0])


def abs() -> Piecewise:
    """|u|."""
    return leaky_relu(-1.0)


def leaky_relu(negative_slope: Scalar = 0.01) -> Piecewise:
    """u above 0, negative_slope · u below."""
    return Piecewise([Polynomial(c1=negative_slope), _LINE], [0.0])


def prelu(weight: Scalar = 0.25) -> Piecewise:
    """Leaky ReLU whose slope is a learned tensor that broadcasts against the mean."""
    return leaky_relu(weight)


def rrelu(lower: float = 1 / 8, upper: float = 1 / 3) -> Piecewise:
    """As in evaluation: the slope below 0 is the middle of its range (in training it is drawn at random)."""
    return leaky_relu((lower + upper) / 2)


def hardtanh(min_val: Scalar = -1.0, max_val: Scalar = 1.0) -> Piecewise:
    """u, kept between min_val and max_val."""
    if not (isinstance(min_val, Tensor) or isinstance(max_val, Tensor) or min_val < max_val):
        raise NormPropError(f"hardtanh: min_val {min_val} is not below max_val {max_val}")
    return Piecewise([Polynomial(min_val), _LINE, Polynomial(max_val)], [min_val, max_val])


def relu6() -> Piecewise:
    """u, kept between 0 and 6."""
    return hardtanh(0.0, 6.0)


def clamp(min: Scalar | None = None, max: Scalar | None = None) -> Piecewise:
    """u, kept between the given bounds; max counts where they are the wrong way round."""
    if isinstance(min, Tensor) and max is not None:
        min = torch.minimum(min, max if isinstance(max, Tensor) else torch.full_like(min, max))
    elif isinstance(max, Tensor) and min is not None:
        min = max.clamp(max=min)
    if min is not None and max is not None:
        tensors = isinstance(min, Tensor) or isinstance(max, Tensor)
        return hardtanh(min, max) if tensors or min < max else Piecewise([Polynomial(max)])
    if min is not None:
        return clamp_min(min)
    return identity() if max is None else clamp_max(max)


def clamp_min(min: Scalar) -> Piecewise:
    """max(u, min)."""
    return Piecewise([Polynomial(min), _LINE], [min])


def clamp_max(max: Scalar) -> Piecewise:
    """min(u, max)."""
    return Piecewise([_LINE, Polynomial(max)], [max])


def threshold(threshold: float, value: float) -> Piecewise:
    """u above the threshold, `value` elsewhere."""
    return Piecewise([Polynomial(value), _LINE], [threshold], continuous=threshold == value)


def hardsigmoid() -> Piecewise:
    """(u + 3)/6, kept between 0 and 1."""
    return Piecewise([_ZERO, Polynomial(c1=1 / 6, origin=-3.0), Polynomial(1.0)], [-3.0, 3.0])


def hardswish() -> Piecewise:
    """u · hardsigmoid(u); its parabola is written from both of its zeros, so that neither loses digits."""
    rise = Polynomial(c1=0.5, c2=1 / 6)
    return Piecewise([_ZERO, Polynomial(c1=-0.5, c2=1 / 6, origin=-3.0), rise, _LINE], [-3.0, -1.5, 3.0])


def hardshrink(lambd: float = 0.5) -> Piecewise:
    """u outside of [−lambd, lambd], 0 inside."""
    return Piecewise([_LINE, _ZERO, _LINE], [-lambd, lambd], continuous=False) if lambd > 0 else identity()


def softshrink(lambd: float = 0.5) -> Piecewise:
    """u moved towards 0 by lambd."""
    if lambd == 0:
        return identity()
    return Piecewise([Polynomial(c1=1.0, origin=-lambd), _ZERO, Polynomial(c1=1.0, origin=lambd)], [-lambd, lambd])


def sign() -> Piecewise:
    """−1 below 0, 1 above."""
    return Piecewise([Polynomial(-1.0), Polynomial(1.0)], [0.0], continuous=False)


def heaviside(values: Scalar = 0.0) -> Piecewise:  # noqa: ARG001  # torch's parameter, which a Gaussian never meets
    """0 below 0, 1 above; `values` at 0 alone."""
    return gt(0.0)


def gt(other: Scalar) -> Piecewise:
    """1 above `other`, 0 below: a comparison as a number."""
    return Piecewise([_ZERO, Polynomial(1.0)], [other], continuous=False)


def ge(other: Scalar) -> Piecewise:
    """As gt, from which it differs with probability 0."""
    return gt(other)


def lt(other: Scalar) -> Piecewise:
    """0 above `other`, 1 below."""
    return Piecewise([Polynomial(1.0), _ZERO], [other], continuous=False)


def le(other: Scalar) -> Piecewise:
    """As lt."""
    return lt(other)
