"""The table of known activations, one row each, and what follows from it: names, spellings, modules, moments."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.activations import closed_forms as elementary
from normprop.activations import piecewise_forms as rectifiers
from normprop.activations import smooth_forms as smooth
from normprop.activations import step_forms as steps
from normprop.activations.breakpoints import Breakpoints, check_elementwise, find_breakpoints
from normprop.activations.normal import Expectations
from normprop.activations.piecewise import Piecewise, piecewise_moments
from normprop.activations.quadrature import integrate, integrate_slope
from normprop.activations.smooth_forms import Smooth
from normprop.errors import NormPropError
from normprop.traced_constant import traced_constant

Form = Callable[..., Piecewise | Smooth | Expectations]
Parameters = tuple[tuple[str, Any], ...]

_SPACES = (torch, F, torch.special, operator)


@dataclass(frozen=True)
class Row:
    """One activation.

    Attributes:
        name: torch's name for it. Every function and method of torch of that name is the activation, also with an
            underscore, in place.
        form: its parameters → a piecewise polynomial, or a function with its slope; or mean, std and parameters → moments.
        module: class of torch.nn.
        also: torch's other names for it.
        aliases: names that only people use.
        variants: parameters with which networks write it out, besides the defaults.
        ruled: False where the rules of arithmetic have one for it.
        random: whether it draws numbers in training.
    """

    name: str
    form: Form
    module: type[nn.Module] | None = None
    also: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    variants: tuple[Parameters, ...] = ()
    ruled: bool = True
    random: bool = False

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, in torch's order."""
        return tuple(p for p in inspect.signature(self.form).parameters if p not in ("mean", "std"))

    @functools.cached_property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """Functions of torch that compute it."""
        found = (getattr(space, s, None) for s in self._spellings() for space in _SPACES)
        return tuple(dict.fromkeys(f for f in found if callable(f)))

    @functools.cached_property
    def methods(self) -> tuple[str, ...]:
        """Names of methods of tensors that compute it."""
        return tuple(s for s in self._spellings() if hasattr(Tensor, s))

    def _spellings(self) -> tuple[str, ...]:
        return tuple(s for name in (self.name, *self.also) for s in (name, f"{name}_"))


ROWS = (
    Row("identity", rectifiers.identity, nn.Identity, aliases=("linear",), ruled=False),
    Row("neg", rectifiers.neg, also=("negative",), ruled=False),
    Row("pow", elementary.pow, ruled=False),
    Row("relu", rectifiers.relu, nn.ReLU),
    Row("relu6", rectifiers.relu6, nn.ReLU6),
    Row("leaky_relu", rectifiers.leaky_relu, nn.LeakyReLU),
    Row("prelu", rectifiers.prelu, nn.PReLU),
    Row("rrelu", rectifiers.rrelu, nn.RReLU, random=True),
    Row("hardtanh", rectifiers.hardtanh, nn.Hardtanh, aliases=("hard_tanh",)),
    Row("hardsigmoid", rectifiers.hardsigmoid, nn.Hardsigmoid, aliases=("hard_sigmoid",)),
    Row("hardswish", rectifiers.hardswish, nn.Hardswish, aliases=("hard_swish",)),
    Row("hardshrink", rectifiers.hardshrink, nn.Hardshrink),
    Row("softshrink", rectifiers.softshrink, nn.Softshrink),
    Row("threshold", rectifiers.threshold, nn.Threshold),
    Row("clamp", rectifiers.clamp, also=("clip",)),
    Row("clamp_min", rectifiers.clamp_min),
    Row("clamp_max", rectifiers.clamp_max),
    Row("abs", rectifiers.abs, also=("absolute",)),
    Row("square", rectifiers.square),
    Row("sigmoid", smooth.sigmoid, nn.Sigmoid, also=("expit",)),
    Row("tanh", smooth.tanh, nn.Tanh),
    Row("silu", smooth.silu, nn.SiLU, aliases=("swish",)),
    Row("mish", smooth.mish, nn.Mish),
    Row("gelu", smooth.gelu, nn.GELU, variants=((("approximate", "tanh"),),)),
    Row("elu", smooth.elu, nn.ELU),
    Row("celu", smooth.celu, nn.CELU),
    Row("selu", smooth.selu, nn.SELU),
    Row("softplus", smooth.softplus, nn.Softplus),
    Row("logsigmoid", smooth.logsigmoid, nn.LogSigmoid, aliases=("log_sigmoid",)),
    Row("softsign", smooth.softsign, nn.Softsign),
    Row("tanhshrink", smooth.tanhshrink, nn.Tanhshrink),
    Row("erf", smooth.erf),
    Row("erfc", smooth.erfc),
    Row("exp", elementary.exp),
    Row("sin", elementary.sin),
    Row("cos", elementary.cos),
    Row("sinh", elementary.sinh),
    Row("cosh", elementary.cosh),
    Row("sign", rectifiers.sign, also=("sgn",)),
    Row("heaviside", rectifiers.heaviside),
    Row("floor", steps.floor),
    Row("ceil", steps.ceil),
    Row("round", steps.round),
    Row("trunc", steps.trunc, also=("fix",)),
    Row("gt", rectifiers.gt, also=("greater",)),
    Row("ge", rectifiers.ge, also=("greater_equal",)),
    Row("lt", rectifiers.lt, also=("less",)),
    Row("le", rectifiers.le, also=("less_equal",)),
)

ACTIVATIONS = {row.name: row for row in ROWS}
_NAMES = {name: row.name for row in ROWS for name in (row.name, *row.also, *row.aliases)}
_MODULES = {row.module: row for row in ROWS if row.module is not None}
# Those whose form gives the moments themselves, from mean and std.
_DIRECT = frozenset(row.name for row in ROWS if "mean" in inspect.signature(row.form).parameters)
_PARAMETERS = {row.name: row.parameters for row in ROWS}
_FUNCTION_OF = {row.name: row.functions[0] for row in ROWS if row.functions}
# How torch runs a function, not what it computes.
_IGNORED = ("inplace", "training", "out")


def _functions() -> Iterator[tuple[object, Row]]:
    for row in ROWS:
        yield from ((function, row) for function in row.functions)
        yield from ((getattr(Tensor, method), row) for method in row.methods)
    yield abs, ACTIVATIONS["abs"]


_FUNCTIONS: dict[object, Row] = dict(_functions())


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
        name = _NAMES.get(_short(fn))
        return None if name is None else (name, {})
    if isinstance(fn, type) and issubclass(fn, nn.Module):
        return canonical(fn()) if any(cls in _MODULES for cls in fn.__mro__) else None
    if isinstance(fn, nn.Module):
        known = next((cls for cls in type(fn).__mro__ if cls in _MODULES), None)
        if known is None or type(fn).forward is not known.forward:
            return None
        row = _MODULES[known]
        return row.name, {p: getattr(fn, p) for p in row.parameters}
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
    return None if found is None else (found.name, {})


def expectations(name: str, mean: Tensor, std: Tensor, parameters: dict[str, Any], *, order: int = 10) -> Expectations:
    """Moments of the named activation at mean and std of one shape; static tensor operations if the table has it."""
    row = ACTIVATIONS.get(_NAMES.get(name, ""))
    parameters = {k: v for k, v in parameters.items() if k not in _IGNORED}
    if row is None:
        fn, points = torch_function(name), _points(name)
        return integrate(functools.partial(fn, **parameters) if parameters else fn, mean, std, points)
    form = _form(row, parameters, mean, std)
    if isinstance(form, Expectations):
        return form
    if isinstance(form, Piecewise):
        return piecewise_moments(form, mean, std)
    return integrate_slope(form.value, form.slope, mean, std, points=form.points, rate=form.rate(mean), order=order)


def known_form(name: str, parameters: dict[str, Any]) -> Piecewise | Smooth | None:
    """The named activation as a piecewise polynomial or by its slope; None if it is neither."""
    row = ACTIVATIONS.get(_NAMES.get(name, ""))
    if row is None or row.name in _DIRECT:
        return None
    form = _form(row, {k: v for k, v in parameters.items() if k not in _IGNORED})
    return None if isinstance(form, Expectations) else form


class Outline(NamedTuple):
    """A function, whether it may have kinks or jumps, and whether it may have jumps."""

    value: Callable[[Tensor], Tensor]
    kinked: bool
    jumping: bool


def outline(name: str, parameters: Mapping[str, Any]) -> Outline:
    """What the named activation computes, and how it bends."""
    row = ACTIVATIONS.get(_NAMES.get(name, ""))
    given = {k: v for k, v in parameters.items() if k not in _IGNORED}
    if row is None:
        return Outline(functools.partial(torch_function(name), **given), True, bool(_points(name).jumps))
    if row.name in _DIRECT:
        jumps = row.form.__module__ == steps.__name__
        return Outline(functools.partial(_FUNCTION_OF[row.name], **given), jumps, jumps)
    form = _form(row, given)
    if isinstance(form, Piecewise):
        return Outline(form.at, True, not form.continuous)
    assert isinstance(form, Smooth)
    return Outline(form.value, False, False)


def written_values() -> Iterator[tuple[str, Parameters, Callable[[Tensor], Tensor]]]:
    """Activations that need no parameters, as names, parameters and functions: what a network may have written out."""
    for row in ROWS:
        given = inspect.signature(row.form).parameters.values()
        if row.random or any(p.default is p.empty for p in given if p.name not in ("mean", "std")):
            continue
        for parameters in ((), *row.variants):
            yield row.name, parameters, outline(row.name, dict(parameters)).value


def _form(row: Row, parameters: dict[str, Any], *given: Tensor) -> Piecewise | Smooth | Expectations:
    """The row's form with its parameters; mean and std are given to those that are made of them."""
    known = _PARAMETERS[row.name]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise NormPropError(f"{row.name} has no parameter {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    try:
        return row.form(*given, **parameters) if row.name in _DIRECT else row.form(**parameters)
    except TypeError as reason:
        raise NormPropError(f"{row.name} needs its parameters: {', '.join(known)}") from reason


def torch_function(name: str) -> Callable[..., Tensor]:
    """The function of torch, torch.special or torch.nn.functional of that name, or an error with the nearest names."""
    short = _short(name)
    for space in (F, torch, torch.special):
        found = getattr(space, short, None)
        if callable(found) and not isinstance(found, type):
            function: Callable[..., Tensor] = found
            return function
    close = get_close_matches(short, [*_NAMES, *(n for n in dir(torch.special) if n[0] != "_")])
    raise NormPropError(f"unknown activation {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))


def _short(name: str) -> str:
    return name.removeprefix("torch.").removeprefix("nn.functional.").removeprefix("special.")


@traced_constant
def _points(name: str) -> Breakpoints:
    return _found(name)


@functools.cache
def _found(name: str) -> Breakpoints:
    function = torch_function(name)
    check_elementwise(function)
    return find_breakpoints(function)
