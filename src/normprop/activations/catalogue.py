"""The table of known activations: names, modules and functions, and how a Gaussian passes through each."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.activations import closed_forms as elementary
from normprop.activations import piecewise_forms as rectifiers
from normprop.activations import smooth_forms as smooth
from normprop.activations.breakpoints import Breakpoints, find_breakpoints
from normprop.activations.normal import Expectations
from normprop.activations.piecewise import Piecewise, piecewise_moments
from normprop.activations.quadrature import integrate, integrate_slope
from normprop.activations.smooth_forms import Smooth
from normprop.errors import NormPropError

Form = Callable[..., Piecewise | Smooth | Expectations]


def _public(module: ModuleType) -> dict[str, Form]:
    return {
        n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__ and n[0] != "_"
    }


_PIECEWISE, _SMOOTH, _ELEMENTARY = _public(rectifiers), _public(smooth), _public(elementary)
FORMS: dict[str, Form] = {**_PIECEWISE, **_SMOOTH, **_ELEMENTARY}
_PARAMETERS = {n: tuple(p for p in inspect.signature(f).parameters if p not in ("mean", "std")) for n, f in FORMS.items()}
ALIASES = {
    "linear": "identity",
    "swish": "silu",
    "expit": "sigmoid",
    "log_sigmoid": "logsigmoid",
    "absolute": "abs",
    "negative": "neg",
    "sgn": "sign",
    "clip": "clamp",
    "hard_tanh": "hardtanh",
    "hard_swish": "hardswish",
    "hard_sigmoid": "hardsigmoid",
}
MODULES: dict[type[nn.Module], str] = {
    getattr(nn, name): name.lower()
    for name in (
        *(
            "Identity",
            "ReLU",
            "ReLU6",
            "PReLU",
            "RReLU",
            "Hardtanh",
            "Hardsigmoid",
            "Hardswish",
            "Hardshrink",
            "Softshrink",
        ),
        *(
            "Threshold",
            "Sigmoid",
            "Tanh",
            "SiLU",
            "Mish",
            "GELU",
            "ELU",
            "CELU",
            "SELU",
            "Softplus",
            "LogSigmoid",
            "Softsign",
        ),
        "Tanhshrink",
    )
} | {nn.LeakyReLU: "leaky_relu"}

# How torch runs a function, not what it computes.
_IGNORED = ("inplace", "training", "out")
_NOT_ELEMENTWISE = (
    "glu",
    "softmax",
    "softmin",
    "log_softmax",
    "gumbel_softmax",
    "normalize",
    "multi_head_attention_forward",
)


def _functions() -> Iterator[tuple[object, str]]:
    for name in (*FORMS, *ALIASES):
        for space in (F, torch, Tensor, torch.special, operator):
            for spelled in (name, name + "_"):
                if callable(found := getattr(space, spelled, None)):
                    yield found, ALIASES.get(name, name)
    yield abs, "abs"


_FUNCTIONS: dict[object, str] = dict(_functions())


def canonical(fn: object) -> tuple[str, dict[str, Any]] | None:
    """Name and parameters of a known activation: its name, a module or its class, a torch function or a partial of one.

    A subclass of a known module counts as that module only if it keeps its forward. PReLU's `weight` is returned as
    it is.

    >>> canonical(nn.LeakyReLU(0.2))
    ('leaky_relu', {'negative_slope': 0.2})
    >>> canonical(functools.partial(F.elu, alpha=0.5))
    ('elu', {'alpha': 0.5})
    """
    if isinstance(fn, str):
        name = fn.removeprefix("torch.").removeprefix("nn.functional.").removeprefix("special.")
        name = ALIASES.get(name, name)
        return (name, {}) if name in FORMS else None
    if isinstance(fn, type) and issubclass(fn, nn.Module):
        return canonical(fn()) if any(cls in MODULES for cls in fn.__mro__) else None
    if isinstance(fn, nn.Module):
        for cls in type(fn).__mro__:
            if cls in MODULES:
                name = MODULES[cls]
                keeps = inspect.getattr_static(type(fn), "forward") is inspect.getattr_static(cls, "forward")
                return (name, {p: getattr(fn, p) for p in _PARAMETERS[name]}) if keeps else None
        return None
    if isinstance(fn, functools.partial):
        inner = canonical(fn.func)
        if inner is None or fn.args:
            return None
        given = {key: value for key, value in fn.keywords.items() if key not in _IGNORED}
        return inner[0], inner[1] | given
    try:
        found = _FUNCTIONS.get(fn)
    except TypeError:
        return None
    return None if found is None else (found, {})


def expectations(name: str, mean: Tensor, std: Tensor, parameters: dict[str, Any], *, order: int = 10) -> Expectations:
    """Moments of the named activation at mean and std of one shape; static tensor operations if the table has it."""
    key = ALIASES.get(name, name)
    parameters = {k: v for k, v in parameters.items() if k not in _IGNORED}
    if key not in FORMS:
        fn, points = torch_function(name), _points(name)
        return integrate(functools.partial(fn, **parameters) if parameters else fn, mean, std, points)
    form = _form(key, parameters, (mean, std) if key in _ELEMENTARY else ())
    if isinstance(form, Expectations):
        return form
    if isinstance(form, Piecewise):
        return piecewise_moments(form, mean, std)
    return integrate_slope(form.value, form.slope, mean, std, points=form.points, rate=form.rate(mean), order=order)


def known_form(name: str, parameters: dict[str, Any]) -> Piecewise | Smooth | None:
    """The named activation as a piecewise polynomial or by its slope; None if it is neither."""
    key = ALIASES.get(name, name)
    if key not in FORMS or key in _ELEMENTARY:
        return None
    form = _form(key, {k: v for k, v in parameters.items() if k not in _IGNORED}, ())
    return None if isinstance(form, Expectations) else form


def _form(key: str, parameters: dict[str, Any], given: tuple[Tensor, ...]) -> Piecewise | Smooth | Expectations:
    unknown = sorted(set(parameters) - set(_PARAMETERS[key]))
    if unknown:
        raise NormPropError(f"{key} has no parameter {', '.join(unknown)}; it has: {', '.join(_PARAMETERS[key]) or 'none'}")
    try:
        return FORMS[key](*given, **parameters)
    except TypeError as reason:
        raise NormPropError(f"{key} needs its parameters: {', '.join(_PARAMETERS[key])}") from reason


def torch_function(name: str) -> Callable[..., Tensor]:
    """The function of torch, torch.special or torch.nn.functional of that name, or an error with the nearest names."""
    short = name.removeprefix("torch.").removeprefix("nn.functional.").removeprefix("special.")
    if short in _NOT_ELEMENTWISE:
        raise NormPropError(f"{name} is not elementwise: its output at one place depends on several inputs")
    for space in (F, torch, torch.special):
        found = getattr(space, short, None)
        if callable(found) and not isinstance(found, type):
            function: Callable[..., Tensor] = found
            return function
    close = get_close_matches(short, [*FORMS, *ALIASES, *(n for n in dir(torch.special) if n[0] != "_")])
    raise NormPropError(f"unknown activation {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))


def _points(name: str) -> Breakpoints:
    return _found(name)


@functools.cache
def _found(name: str) -> Breakpoints:
    return find_breakpoints(torch_function(name))


# All that torch.compiler.assume_constant_result does; calling it would import the compiler, which takes a second.
_points._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function takes any attribute
