"""Activations: any scalar function of one tensor, by `normprop.moments`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.activations.activation_moments import ActivationMoments, activation_moments, canonical, moments
from normprop.activations.catalogue import ROWS
from normprop.activations.compiled_rectifiers import native_rectified
from normprop.activations.fast_moments import lane_moments, mean_square_slope
from normprop.activations.rectifier_moments import rectified_moments
from normprop.channel_moments import Moments
from normprop.native.operands import handles
from normprop.rules.spectral import Spectrum, magnitude
from normprop.rules.table import TABLE, Rule, Standing, rule
from normprop.rules.uniform import Uniform, uniform_activation

# Name for `activation_moments` → its parameters in order, and where a network meets it.
FUNCTIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    row.name: (" ".join(row.parameters), (*row.functions, *row.methods)) for row in ROWS if row.ruled
}
_COMPARISONS = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge"}


def _fitting(name: str, parameter: Any, x: Moments) -> Any:
    """PReLU's slopes, a vector, as a tensor that meets the channels of x along dimension 1."""
    if name == "prelu" and isinstance(parameter, Tensor) and parameter.numel() > 1:
        return parameter.reshape(1, -1, *(1,) * (x.mean.dim() - 2))
    return parameter


def named_activation_moments(
    name: str, parameters: tuple[str, ...], x: Moments, *args: Any, **kwargs: Any
) -> ActivationMoments | None:
    """All moments of a named activation called as in torch: ``F.leaky_relu(x, 0.2)``; None for what compares two tensors."""
    given = _given(name, parameters, x, args, kwargs)
    if any(isinstance(value, Moments) for value in given.values()) or not isinstance(x, Moments):
        return None
    return activation_moments(name, x.mean, x.std, **given)


def _given(
    name: str, parameters: tuple[str, ...], x: Moments, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The parameters of a call by their names, without what says how to run it."""
    given = dict(zip(parameters, args, strict=False)) | kwargs
    return {k: _fitting(name, v, x) for k, v in given.items() if k not in ("inplace", "training", "out")}


def named_activation(name: str, parameters: tuple[str, ...], x: Moments, *args: Any, **kwargs: Any) -> Moments:
    """``E f(u)`` and ``Var f(u)`` for u ~ N(m, v), at every channel's own m and v.

    Arpit et al. 2016, remark 1 and eq. 12, at any m and v as by Shekhovtsov & Flach 2019 and Labatie et al. 2021.
    """
    if name in _COMPARISONS and not isinstance(x, Moments):  # a number beside a tensor
        return named_activation(_COMPARISONS[name], parameters, *args, x, **kwargs)
    given = _given(name, parameters, x, args, kwargs)
    if name in _COMPARISONS and isinstance(given["other"], Moments):
        difference, given = x.plus(given["other"].scaled(-1.0)), {"other": 0.0}
        return _activation(name, Moments(difference.mean, difference.var), given)
    found = _activation(name, x, given)
    if name == "rrelu" and (kwargs.get("training") or args[2:3] == (True,)):
        return _with_random_slopes(x, found, given)
    return found


def _activation(name: str, x: Moments, parameters: Mapping[str, Any]) -> Moments:
    if isinstance(x, Uniform) and (found := uniform_activation(name, x, parameters)) is not None:
        return found
    if isinstance(x, Spectrum) and name == "abs":
        return magnitude(x)
    slope = rectifier_slope(name, parameters)
    if slope is not None:
        return (natively_rectified([x], slope) or [_rectified(x, slope)])[0]
    return Moments(*lane_moments(name, x.mean, x.var, parameters))


def _with_random_slopes(x: Moments, found: Moments, parameters: Mapping[str, Any]) -> Moments:
    """RReLU in training: slopes a, even over their range, add ``Var a · E min(u, 0)²`` (law of total variance)."""
    lower, upper = parameters.get("lower", 1 / 8), parameters.get("upper", 1 / 3)
    below = activation_moments("relu", -x.mean, x.std).second
    return Moments(found.mean, found.var + (upper - lower) ** 2 / 12 * below)


def rectifier_slope(name: str, parameters: Mapping[str, Any]) -> float | None:
    """Slope below zero of ReLU or LeakyReLU, which moment lanes compute in one function; None for all else."""
    if name == "relu":
        return 0.0
    slope = parameters.get("negative_slope", 0.01)
    return float(slope) if name == "leaky_relu" and isinstance(slope, int | float) else None


def named_slope(name: str, parameters: tuple[str, ...], x: Moments, *args: Any, **kwargs: Any) -> float | None:
    """Slope below zero of a named activation called as in torch, if it is ReLU or LeakyReLU; None for all else."""
    return rectifier_slope(name, named_parameters(name, parameters, x, *args, **kwargs))


def named_parameters(name: str, parameters: tuple[str, ...], x: Moments, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The parameters of a named activation called as in torch."""
    return _given(name, parameters, x, args, kwargs)


def module_slope(module: nn.Module) -> float | None:
    """Slope below zero of a ReLU or LeakyReLU; None for any other module."""
    known = canonical(module)
    return None if known is None else rectifier_slope(*known)


def natively_rectified(xs: Sequence[Moments], slope: float) -> list[Moments] | None:
    """Several tensors after a leaky rectifier, if compiled functions can do it as they lie; else None."""
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
    return activation_moments(name, x.mean, x.std, **{k: _fitting(name, v, x) for k, v in parameters.items()})


@rule(*(row.module for row in ROWS if row.ruled and row.module is not None))
def module_activation(module: nn.Module, x: Moments) -> Moments:
    """As `named_activation`; learned parameters (PReLU's slopes) take part in the gradient (Arpit et al. 2016, remark 2)."""
    known = canonical(module)
    if known is None:
        result = moments(module, x.mean, x.std)
        return Moments(result.mean, result.var)
    name, parameters = known
    found = _activation(name, x, {k: _fitting(name, v, x) for k, v in parameters.items()})
    return _with_random_slopes(x, found, parameters) if name == "rrelu" and module.training else found


def _of_one_tensor(*args: Any, **kwargs: Any) -> tuple[Standing, str] | None:
    """Parameters that depend on the input make it another function."""
    others = (*args[1:], *kwargs.values())
    return ("unsupported", "a parameter of it depends on the input") if Moments in others else None


for _name, (_parameters, _keys) in FUNCTIONS.items():
    for _key in dict.fromkeys(_keys):  # torch gives some functions two names
        _judge = None if _name in _COMPARISONS else _of_one_tensor
        TABLE.add(_key, Rule(named_activation, leading=(_name, tuple(_parameters.split())), judge=_judge))


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


def squared_slope(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Tensor | None:
    """``E f'(u)²`` of an activation for a rule's call, at every element; None for other rules."""
    function, args, kwargs = call
    found = None
    if function is named_activation and isinstance(args[2], Moments):
        given = _given(args[0], args[1], args[2], args[3:], kwargs)
        if not any(isinstance(value, Moments) for value in given.values()):
            found = mean_square_slope(args[0], args[2].mean, args[2].var, given)
    elif function is module_activation and (known := canonical(args[0])) is not None:
        found = mean_square_slope(known[0], args[1].mean, args[1].var, known[1])
    if found is None and (full := full_moments(call)) is not None:
        found = full.slope
    return found
