"""Several elementwise operations on one tensor taken together: moments of the function that they compose.

A program is a tuple of steps ``(operation, arguments, keyword arguments)``. "%0" among the arguments is the tensor, "%n"
the result of step n, "@n" the operand of that index: a parameter or a module. The result is that of the last step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normprop.activations.activation_moments import ActivationMoments, check_elementwise, function_moments, mean_and_var
from normprop.activations.breakpoints import Breakpoints, find_breakpoints
from normprop.activations.catalogue import ACTIVATIONS, ROWS, Parameters, written_values
from normprop.activations.crossings import find_crossings
from normprop.activations.fast_moments import eager
from normprop.channel_moments import Moments, safe_sqrt
from normprop.rules import elementwise
from normprop.rules.table import Standing

Step = tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]]
Program = tuple[Step, ...]
Operand = Tensor | nn.Module

# Bends are searched this far out, and further where the numbers in a program call for it.
_FAR = 2.0**14
_FARTHEST = 1e12
_NEAREST = 64.0
_HUGE = 1e26  # no Gaussian that reaches there has moments that are worth their digits
_REACH = 30.0  # where a function that has moments is finite
# Panel ends of every program; a program's own come on top.
_LADDER = frozenset([0.0, *(sign * 2.0**k for k in range(-2, 7) for sign in (-1, 1))])

OPERATIONS: dict[str, Callable[..., Any]] = {
    **{row.name: row.functions[0] for row in ROWS if row.ruled and not row.random},
    "same": lambda x: x,
    "add": lambda x, other, alpha=1: x + alpha * other,
    "sub": lambda x, other, alpha=1: x - alpha * other,
    "rsub": lambda x, other, alpha=1: other - alpha * x,
    "mul": lambda x, other: x * other,
    "div": lambda x, other: x / other,
    "neg": torch.neg,
    "addcmul": lambda x, tensor1, tensor2, value=1: x + value * tensor1 * tensor2,
    "lerp": lambda x, end, weight: x + weight * (end - x),
    "power": lambda x, exponent: x**exponent,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "log": torch.log,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "zeros": lambda x: torch.zeros_like(x),
    "ones": lambda x: torch.ones_like(x),
    "full_like": lambda x, fill_value: torch.full_like(x, fill_value),
    "prelu": lambda x, weight: torch.where(x > 0, x, weight * x),
    "module": lambda module, x: module(x),
    "where": torch.where,
    "masked_fill": lambda x, mask, value: torch.where(mask, value, x),
    "logical_not": torch.logical_not,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinite": torch.isfinite,
    "ndtr": torch.special.ndtr,
    "logaddexp": torch.logaddexp,
    **{name: getattr(torch, name) for name in ("log1p", "expm1", "atan", "asinh", "exp2", "sinc")},
}
# Steps without a kink.
_SMOOTH = frozenset(
    "same add sub rsub mul div neg addcmul lerp power sqrt rsqrt reciprocal log zeros ones full_like ndtr logaddexp log1p "
    "expm1 atan asinh exp2 sinc square exp sin cos sinh cosh".split()
) | {name for name, row in ACTIVATIONS.items() if row.form.__module__.endswith("smooth_forms")}


def operation(name: str) -> Callable[..., Any] | None:
    """What runs a step of that name: one of `OPERATIONS`, or a function of torch by the path it is imported by."""
    if not name.startswith("torch."):
        return OPERATIONS.get(name)
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found if callable(found) else None


def run(program: Program, u: Tensor, operands: Sequence[Operand]) -> Tensor:
    """The program's value at u, in u's dtype.

    Args:
        program: see the module.
        u: any shape that broadcasts against the operands from the right.
        operands: what "@n" stands for.
    """
    values = [u]

    def take(argument: Any) -> Any:
        if not isinstance(argument, str) or argument[:1] not in ("%", "@"):
            return argument
        if argument[0] == "%":
            return values[int(argument[1:])]
        operand = operands[int(argument[1:])]
        floating = isinstance(operand, Tensor) and operand.is_floating_point()
        return operand.to(u.dtype) if floating and isinstance(operand, Tensor) else operand

    for name, args, kwargs in program:
        function = operation(name)
        assert function is not None
        found = function(*[take(a) for a in args], **{key: take(value) for key, value in kwargs})
        # A mask that becomes a number: (x > 0).float() * x
        values.append(found.to(u.dtype) if name == "same" else found)
    return values[-1].to(u.dtype)


def composed(
    x: Moments, program: Program, bends: tuple[float, ...], jumps: tuple[float, ...], *operands: Operand
) -> Moments:
    """``E f(u)`` and ``Var f(u)`` for u ~ N(m, v) and the function f that a program computes (Arpit et al., 2016, eq. 12).

    A known activation written out, such as ``x * sigmoid(x)``, takes that activation's function in eager mode.

    Args:
        x: moments of u.
        program: see the module.
        bends: where f bends, besides 0 and the powers of two from ¼ to 64 in both directions.
        jumps: those where f jumps.
        operands: parameters and modules of the program.
    """
    known = _known(program) if not operands and eager(x.mean) and eager(x.var) else None
    if known is not None:
        return elementwise.named_activation(known[0], (), x, **dict(known[1]))
    mean, var = _broadcast(x, operands)
    points = sorted({*_LADDER, *bends})
    kinked = any(name not in _SMOOTH for name, *_ in program)
    function = lambda u: run(program, u, operands)
    return Moments(*mean_and_var(function, mean, var, points, kinked=kinked, jumping=bool(jumps)))


@functools.cache
def _known(program: Program) -> tuple[str, Parameters] | None:
    """The activation that a program without operands agrees with: near 0, over all magnitudes, and around its own bends."""
    found = _search_without_operands(program)
    if found is None:
        return None
    sizes = 2.0 ** torch.arange(-20.37, 40.0, 0.5, dtype=torch.float64, device="cpu")
    bends = torch.tensor([0.0, *found.bends, *found.crossings], dtype=torch.float64, device="cpu")
    offsets = [sign * size * (1 + bends.abs()) for size in (1e-6, 1e-3, 0.1) for sign in (-1, 1)]
    near = torch.linspace(-15.03, 14.91, 400, dtype=torch.float64, device="cpu")
    u = torch.cat([near, sizes, -sizes, *(bends + offset for offset in offsets)])
    with torch.no_grad():
        value = run(program, u, ())
        # What overflows far out has the limit that it is written for, or is infinite in the network, too.
        u, value = u[value.isfinite()], value[value.isfinite()]
        # torch's softplus is a line from 20 on, off by 2e-9.
        tolerance = torch.where(u.abs() < 15, 1e-13, 1e-9) * value.abs() + 1e-14
        for name, parameters, function in written_values():
            if bool(((function(u) - value).abs() <= tolerance).all()):
                return name, parameters
    return None


def composed_moments(
    x: Moments, program: Program, bends: tuple[float, ...], jumps: tuple[float, ...], *operands: Operand
) -> ActivationMoments:
    """All moments of the function that a program computes; arguments as for `composed`."""
    mean, var = _broadcast(x, operands)
    points = Breakpoints(tuple(sorted({*_LADDER, *bends})), jumps)
    return function_moments(lambda u: run(program, u, operands), mean, safe_sqrt(var), points)


def full_moments(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> ActivationMoments | None:
    """All moments of a scalar function for a rule's call (function, arguments, keyword arguments); None for other rules."""
    return composed_moments(*call[1]) if call[0] is composed else elementwise.full_moments(call)


def squared_slope(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Tensor | None:
    """``E f'(u)²`` of a scalar function for a rule's call, at every element; None for other rules."""
    if call[0] is not composed:
        return elementwise.squared_slope(call)
    x, program, _, _, *operands = call[1]
    known = None if operands else _known(program)
    if known is None:
        return composed_moments(*call[1]).slope
    return elementwise.squared_slope((elementwise.named_activation, (known[0], (), x), dict(known[1])))


def _broadcast(x: Moments, operands: Sequence[Operand]) -> tuple[Tensor, Tensor]:
    """Mean and variance expanded to the shape that they take together with the operands."""
    shapes = (o.shape for o in operands if isinstance(o, Tensor))
    shape = torch.broadcast_shapes(x.mean.shape, x.var.shape, *shapes)
    return x.mean.expand(shape), x.var.expand(shape)


class _Found(NamedTuple):
    """Bends and jumps of a program as far out as `reach`; `crossings`: what its numbers single out; whether it was seen."""

    bends: tuple[float, ...]
    jumps: tuple[float, ...]
    crossings: tuple[float, ...] = ()
    reach: float = _FARTHEST
    seen: bool = True


def find_bends(program: Program, operands: Sequence[Operand] = ()) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """What `composed` needs to know of a program: its bends and jumps, found once.

    They are found wherever the numbers in the program put them (see `find_crossings`), and by halving panels. Parameters
    are taken at their present mean. None if the program or its derivative is not finite on the whole line (the logarithm
    of a Gaussian has no moments), or if it bends more often than can be followed.

    Raises:
        NormPropError: it is random, or not elementwise.

    >>> find_bends((("relu", ("%0",), ()), ("clamp_max", ("%1", 100.0), ())))
    ((100.0,), ())
    """
    found = _search(program, operands)
    return None if found is None else (found.bends, found.jumps)


def composed_standing(program: Program, operands: Sequence[Operand] = ()) -> tuple[Standing, str]:
    """Standing of `composed` for a program that has bends, and the reason."""
    found = _search(program, operands)
    if found is None or not found.seen:
        return "approximate", "what it computes outside of torch's operations may bend unseen"
    if found.reach < _FAR:
        return "approximate", f"beyond {found.reach:g} it varies faster than its panels"
    return "exact", ""


def _search(program: Program, operands: Sequence[Operand]) -> _Found | None:
    if any(isinstance(o, Tensor) and o.is_meta for o in operands):
        return _Found((), ())  # a network without values: shapes are all that can be asked for
    if not operands:
        return _search_without_operands(program)
    middle = [o.detach().double().mean().cpu() if isinstance(o, Tensor) and o.is_floating_point() else o for o in operands]
    return _searched(lambda u: run(program, u, middle))


@functools.cache
def _search_without_operands(program: Program) -> _Found | None:
    return _searched(lambda u: run(program, u, ()))


def _searched(fn: Callable[[Tensor], Tensor]) -> _Found | None:
    check_elementwise(fn)
    u = torch.arange(-_REACH, _REACH + 0.25, 0.25, dtype=torch.float64)
    with torch.no_grad():
        finite = bool(fn(u).isfinite().all())
    # Off the round numbers, where a derivative may well be missing.
    if not finite or not bool(torch.func.grad(lambda x: fn(x).sum())(u + 0.1).isfinite().all()):
        return None
    crossings = find_crossings(fn, -_FARTHEST, _FARTHEST)
    far = max([_FAR, *(4 * abs(x) for x in crossings.points)])
    for reach in (far, _FAR, 16 * _NEAREST, _NEAREST):
        points = find_breakpoints(fn, -reach, reach, straight=_NEAREST)
        if points.resolved:
            kept = [e for e in points.edges if e not in _LADDER and abs(e) < reach]
            with torch.no_grad():
                moderate = (fn(torch.tensor(kept, dtype=torch.float64)).abs() < _HUGE).tolist()
            bends = tuple(e for e, one in zip(kept, moderate, strict=True) if one)
            return _Found(bends, points.jumps, crossings.points, reach, points.seen)
    return None
