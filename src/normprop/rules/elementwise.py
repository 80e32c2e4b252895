"""Activations: any scalar function of one tensor, by `normprop.moments`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.activations.activation_moments import ActivationMoments, activation_moments, canonical, moments
from normprop.activations.compiled_rectifiers import native_rectified
from normprop.activations.fast_moments import lane_moments
from normprop.activations.rectifier_moments import rectified_moments
from normprop.channel_moments import Moments
from normprop.native.operands import handles
from normprop.rules.table import TABLE, Rule, rule

# One line an operation: its name for `activation_moments`, its parameters in order, and where a graph meets it.
FUNCTIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "relu": ("", (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")),
    "relu6": ("", (F.relu6,)),
    "leaky_relu": ("negative_slope", (F.leaky_relu, F.leaky_relu_)),
    "prelu": ("weight", (F.prelu, torch.prelu)),
    "elu": ("alpha", (F.elu, F.elu_)),
    "celu": ("alpha", (F.celu, F.celu_)),
    "selu": ("", (F.selu, F.selu_)),
    "gelu": ("approximate", (F.gelu,)),
    "silu": ("", (F.silu,)),
    "mish": ("", (F.mish,)),
    "hardswish": ("", (F.hardswish,)),
    "hardsigmoid": ("", (F.hardsigmoid,)),
    "hardtanh": ("min_val max_val", (F.hardtanh, F.hardtanh_)),
    "hardshrink": ("lambd", (F.hardshrink, torch.hardshrink, "hardshrink")),
    "softshrink": ("lambd", (F.softshrink,)),
    "softplus": ("beta threshold", (F.softplus,)),
    "softsign": ("", (F.softsign,)),
    "tanhshrink": ("", (F.tanhshrink,)),
    "logsigmoid": ("", (F.logsigmoid,)),
    "threshold": ("threshold value", (F.threshold, torch.threshold_)),
    "sigmoid": ("", (torch.sigmoid, torch.sigmoid_, torch.special.expit, "sigmoid", "sigmoid_")),
    "tanh": ("", (torch.tanh, torch.tanh_, "tanh", "tanh_")),
    "exp": ("", (torch.exp, "exp", "exp_")),
    "erf": ("", (torch.erf, "erf", "erf_")),
    "sin": ("", (torch.sin, "sin", "sin_")),
    "cos": ("", (torch.cos, "cos", "cos_")),
    "abs": ("", (torch.abs, "abs", "abs_")),
    "square": ("", (torch.square, "square", "square_")),
    "clamp": ("min max", (torch.clamp, torch.clamp_, "clamp", "clamp_", torch.clip, "clip", "clip_")),
    "clamp_min": ("min", (torch.clamp_min, "clamp_min", "clamp_min_")),
    "clamp_max": ("max", (torch.clamp_max, "clamp_max", "clamp_max_")),
    "sign": ("", (torch.sign, "sign", "sign_")),
    "sinh": ("", (torch.sinh, "sinh")),
    "cosh": ("", (torch.cosh, "cosh")),
    "erfc": ("", (torch.erfc, torch.special.erfc, "erfc")),
    "rrelu": ("lower upper", (F.rrelu, F.rrelu_)),
}

_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Softplus, nn.Softsign, nn.Tanhshrink,
    nn.LogSigmoid, nn.Threshold, nn.Sigmoid, nn.Tanh,
)  # fmt: skip


def _fitting(parameter: Any, x: Moments) -> Any:
    """A parameter per channel (PReLU's slopes) as a tensor that meets the channels of x along dimension 1."""
    if isinstance(parameter, Tensor) and parameter.numel() > 1:
        return parameter.reshape(1, -1, *(1,) * (x.mean.dim() - 2))
    return parameter


def named_activation_moments(
    name: str, parameters: tuple[str, ...], x: Moments, *args: Any, **kwargs: Any
) -> ActivationMoments:
    """All moments of a named activation called as in torch: ``F.leaky_relu(x, 0.2)``."""
    return activation_moments(name, x.mean, x.std, **_given(parameters, x, args, kwargs))


def _given(parameters: tuple[str, ...], x: Moments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a call by their names, without what says how to run it."""
    given = dict(zip(parameters, args, strict=False)) | kwargs
    return {k: _fitting(v, x) for k, v in given.items() if k not in ("inplace", "training")}


def named_activation(name: str, parameters: tuple[str, ...], x: Moments, *args: Any, **kwargs: Any) -> Moments:
    """``E f(u)`` and ``Var f(u)`` for u ~ N(m, v) ([P] remark 1 and eq. 12, at the channel's own m and v [SF, PN])."""
    return _activation(name, x, _given(parameters, x, args, kwargs))


def _activation(name: str, x: Moments, parameters: Mapping[str, Any]) -> Moments:
    slope = _rectifier_slope(name, parameters)
    if slope is not None:
        return (natively_rectified([x], slope) or [_rectified(x, slope)])[0]
    return Moments(*lane_moments(name, x.mean, x.var, parameters))


def _rectifier_slope(name: str, parameters: Mapping[str, Any]) -> float | None:
    """Slope below zero of ReLU or LeakyReLU, which moment lanes compute in one function; None for all else."""
    if name == "relu":
        return 0.0
    slope = parameters.get("negative_slope", 0.01)
    return float(slope) if name == "leaky_relu" and isinstance(slope, int | float) else None


def named_slope(name: str, parameters: tuple[str, ...], x: Moments, *args: Any, **kwargs: Any) -> float | None:
    """Slope below zero of a named activation called as in torch, if it is ReLU or LeakyReLU; None for all else."""
    return _rectifier_slope(name, _given(parameters, x, args, kwargs))


def module_slope(module: nn.Module) -> float | None:
    """Slope below zero of a ReLU or LeakyReLU; None for any other module."""
    known = canonical(module)
    return None if known is None else _rectifier_slope(*known)


def natively_rectified(xs: Sequence[Moments], slope: float) -> list[Moments] | None:
    """Several tensors behind a leaky rectifier, if compiled functions can do it as they lie; else None."""
    tensors = [t for x in xs for t in (x.mean, x.var)]
    if any(x.mean.shape != x.var.shape or not x.mean.is_contiguous() or not x.var.is_contiguous() for x in xs):
        return None
    means, variances = tensors[::2], tensors[1::2]
    if handles(tensors, tensors[0].dtype):
        return [Moments(*pair) for pair in native_rectified(means, variances, slope)]
    return None


def _rectified(x: Moments, slope: float) -> Moments:
    mean, var = torch.broadcast_tensors(x.mean, x.var)
    return Moments(*rectified_moments(mean, var, slope))


def module_activation_moments(module: nn.Module, x: Moments) -> ActivationMoments:
    """All moments of an activation module; an unknown module that works elementwise is integrated numerically."""
    known = canonical(module)
    if known is None:
        return moments(module, x.mean, x.std)
    name, parameters = known
    return activation_moments(name, x.mean, x.std, **{k: _fitting(v, x) for k, v in parameters.items()})


@rule(*_MODULES)
def module_activation(module: nn.Module, x: Moments) -> Moments:
    """As `named_activation`; learned parameters (PReLU's slopes) take part in the gradient ([P] remark 2)."""
    known = canonical(module)
    if known is None:
        result = moments(module, x.mean, x.std)
        return Moments(result.mean, result.var)
    name, parameters = known
    return _activation(name, x, {k: _fitting(v, x) for k, v in parameters.items()})


for _name, (_parameters, _keys) in FUNCTIONS.items():
    for _key in dict.fromkeys(_keys):  # torch gives some functions two names
        TABLE.add(_key, Rule(named_activation, leading=(_name, tuple(_parameters.split()))))


@rule(nn.GLU, F.glu, standing="approximate", reason="the two halves are taken as independent", shaped=True)
def glu(*args: Any, in_shapes: Any, out_shape: Any, **kwargs: Any) -> Moments:
    """``a · σ(b)`` for the halves a, b of one dimension: moments of a product of independent factors (derived)."""
    module = args[0] if isinstance(args[0], nn.Module) else None
    x = args[1] if module is not None else args[0]
    dim = (
        module.dim if isinstance(module, nn.GLU) else inspect.signature(F.glu).bind(*args, **kwargs).arguments.get("dim", -1)
    )
    shape = list(x.mean.shape)
    shape[dim] = in_shapes[0][dim]
    x = x.expanded(shape)
    (mean_a, mean_b), (var_a, var_b) = x.mean.chunk(2, dim), x.var.chunk(2, dim)
    gate = activation_moments("sigmoid", mean_b, Moments(mean_b, var_b).std)
    return Moments(mean_a, var_a).times(Moments(gate.mean, gate.var))


def full_moments(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> ActivationMoments | None:
    """All moments of an activation for a rule's call (function, arguments, keyword arguments); None for other rules."""
    function, args, kwargs = call
    if function is named_activation:
        return named_activation_moments(*args, **kwargs)
    return module_activation_moments(*args) if function is module_activation else None
