"""The table of known activations: name, parameters in torch's order, and how a Gaussian goes through."""

import inspect
import math
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.errors import NormPropError
from normprop.gaussian import Expectations
from normprop.piecewise import Piecewise, Polynomial, Scalar, piecewise_moments
from normprop.quadrature import integrate

ZERO = Polynomial()
LINE = Polynomial(c1=1.0)


def constant(value: Scalar) -> Polynomial:
    return Polynomial(c0=value)


def identity() -> Piecewise:
    return Piecewise([LINE])


def relu() -> Piecewise:
    return Piecewise([ZERO, LINE], [0.0])


def leaky_relu(negative_slope: Scalar = 0.01) -> Piecewise:
    return Piecewise([Polynomial(c1=negative_slope), LINE], [0.0])


def prelu(weight: Scalar = 0.25) -> Piecewise:
    return leaky_relu(weight)


def rrelu(lower: float = 1 / 8, upper: float = 1 / 3) -> Piecewise:
    return leaky_relu((lower + upper) / 2)


def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Piecewise:
    return Piecewise([constant(min_val), LINE, constant(max_val)], [min_val, max_val])


def relu6() -> Piecewise:
    return hardtanh(0.0, 6.0)


PIECEWISE: dict[str, Callable[..., Piecewise]] = {
    f.__name__: f for f in (identity, relu, leaky_relu, prelu, rrelu, hardtanh, relu6)
}
SMOOTH: dict[str, Callable[..., Tensor]] = {
    name: getattr(F, name)
    for name in ("gelu", "silu", "mish", "softplus", "elu", "celu", "selu", "logsigmoid", "softsign", "tanhshrink", "hardswish",
                 "hardsigmoid", "hardshrink", "softshrink")
} | {name: getattr(torch, name) for name in ("tanh", "sigmoid", "exp", "erf", "sin", "cos", "abs", "square")}
ALIASES = {"swish": "silu", "linear": "identity"}
MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity", nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.PReLU: "prelu", nn.RReLU: "rrelu", nn.Hardtanh: "hardtanh",
    nn.ReLU6: "relu6", nn.GELU: "gelu", nn.SiLU: "silu", nn.Mish: "mish", nn.Softplus: "softplus", nn.ELU: "elu", nn.CELU: "celu",
    nn.SELU: "selu", nn.LogSigmoid: "logsigmoid", nn.Softsign: "softsign", nn.Tanhshrink: "tanhshrink", nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid", nn.Hardshrink: "hardshrink", nn.Softshrink: "softshrink", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
}  # fmt: skip
ATTRIBUTES = {"lambd": "lambd", "approximate": "approximate", "beta": "beta", "threshold": "threshold", "alpha": "alpha",
              "negative_slope": "negative_slope", "min_val": "min_val", "max_val": "max_val", "lower": "lower", "upper": "upper",
              "weight": "weight"}  # fmt: skip


def canonical(fn: object) -> tuple[str, dict[str, Any]] | None:
    """Name and parameters of a known activation given as name, module, function or partial; None for anything else."""
    if isinstance(fn, str):
        return ALIASES.get(fn, fn), {}
    if isinstance(fn, type) and issubclass(fn, nn.Module):
        fn = fn()
    if isinstance(fn, nn.Module):
        for cls in type(fn).__mro__:
            if cls in MODULES and type(fn).forward is cls.forward:  # type: ignore[attr-defined]
                names = {k: getattr(fn, k) for k in ATTRIBUTES if hasattr(fn, k)}
                return MODULES[cls], {} if MODULES[cls] == "relu6" else names
        return None
    if isinstance(fn, partial):
        inner = canonical(fn.func)
        return None if inner is None or fn.args else (inner[0], inner[1] | fn.keywords)
    for name in (*PIECEWISE, *SMOOTH):
        if any(fn is getattr(space, name, None) for space in (F, torch, Tensor)):
            return name, {}
    return None


def expectations(name: str, mean: Tensor, std: Tensor, parameters: dict[str, Any]) -> Expectations:
    """Moments of the named activation; float64 in, float64 out."""
    name = ALIASES.get(name, name)
    parameters = {k: v for k, v in parameters.items() if k not in ("inplace", "training")}
    if name in PIECEWISE:
        return piecewise_moments(PIECEWISE[name](**parameters), mean, std)
    if name in SMOOTH:
        return integrate(lambda u: SMOOTH[name](u, **parameters), mean, std)
    close = get_close_matches(name, [*PIECEWISE, *SMOOTH, *ALIASES])
    raise NormPropError(f"unknown activation {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
