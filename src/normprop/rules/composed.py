"""Several elementwise operations on one tensor taken together: moments of the function that they compose.

A program is a tuple of steps ``(operation, arguments, keyword arguments)``. "%0" among the arguments is the tensor, "%n"
the result of step n, "@n" the operand of that index: a parameter or a module. The result is that of the last step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.activations.activation_moments import ActivationMoments, check_elementwise, function_moments, mean_and_var
from normprop.activations.breakpoints import Breakpoints, find_breakpoints
from normprop.activations.fast_moments import eager
from normprop.channel_moments import Moments
from normprop.rules import elementwise

Step = tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]]
Program = tuple[Step, ...]
Operand = Tensor | nn.Module

_FAR = 64.0
_REACH = 30.0  # where a function that has moments is finite
# Panel ends of every program, those that `find_breakpoints` starts from; a program's own come on top.
_LADDER = frozenset([0.0, *(sign * 2.0**k for k in range(-2, 7) for sign in (-1, 1))])


def _named(name: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(torch, name, None) or getattr(F, name)
    return function


OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: _named(name) for name in elementwise.FUNCTIONS if name != "rrelu"},  # which is random
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
    "gt": lambda x, other: x > other,
    "ge": lambda x, other: x >= other,
    "lt": lambda x, other: x < other,
    "le": lambda x, other: x <= other,
    "logical_not": torch.logical_not,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "ndtr": torch.special.ndtr,
    **{name: _named(name) for name in ("log1p", "expm1", "atan", "asinh", "exp2", "sinc", "logaddexp")},
}  # fmt: skip


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
    """``E f(u)`` and ``Var f(u)`` for u ~ N(m, v) and the function f that a program computes ([P] eq. 12), by quadrature.

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
    mean, std = _broadcast(x, operands)
    points = sorted({*_LADDER, *bends})
    return Moments(*mean_and_var(lambda u: run(program, u, operands), mean, std, points))


# Activations that networks write out.
_WRITTEN_OUT: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    *((name, ()) for name in ("relu", "relu6", "silu", "gelu", "mish", "hardswish", "hardsigmoid", "hardtanh")),
    *((name, ()) for name in ("elu", "selu", "softplus", "logsigmoid", "sigmoid", "tanh", "tanhshrink")),
    ("gelu", (("approximate", "tanh"),)),
)


@functools.cache
def _known(program: Program) -> tuple[str, tuple[tuple[str, Any], ...]] | None:
    """The activation that a program without operands agrees with to rounding at every one of 400 places."""
    u = torch.linspace(-15.03, 14.91, 400, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        value = run(program, u, ())
        for name, parameters in _WRITTEN_OUT:
            other = _named(name)(u, **dict(parameters))
            if torch.allclose(value, other, rtol=1e-13, atol=1e-14):
                return name, parameters
    return None


def composed_moments(
    x: Moments, program: Program, bends: tuple[float, ...], jumps: tuple[float, ...], *operands: Operand
) -> ActivationMoments:
    """All moments of the function that a program computes; arguments as for `composed`."""
    mean, std = _broadcast(x, operands)
    points = Breakpoints(tuple(sorted({*_LADDER, *bends})), jumps)
    return function_moments(lambda u: run(program, u, operands), mean, std, points)


def full_moments(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> ActivationMoments | None:
    """All moments of a scalar function for a rule's call (function, arguments, keyword arguments); None for other rules."""
    return composed_moments(*call[1]) if call[0] is composed else elementwise.full_moments(call)


def _broadcast(x: Moments, operands: Sequence[Operand]) -> tuple[Tensor, Tensor]:
    """Mean and std expanded to the shape that they take together with the operands."""
    shapes = (o.shape for o in operands if isinstance(o, Tensor))
    shape = torch.broadcast_shapes(x.mean.shape, x.var.shape, *shapes)
    return x.mean.expand(shape), x.std.expand(shape)


def find_bends(program: Program, operands: Sequence[Operand] = ()) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """What `composed` needs to know of a program: its bends and jumps, found once.

    Parameters are taken at their present mean. None if the program or its derivative is not finite on the whole line (the
    logarithm of a Gaussian has no moments), or if it bends more often than can be followed.

    Raises:
        NormPropError: it is random, or not elementwise.

    >>> find_bends((("relu6", ("%0",), ()), ("mul", ("%0", "%1"), ())))
    ((6.0,), ())
    """
    if any(isinstance(o, Tensor) and o.is_meta for o in operands):
        return (), ()  # a network without values: shapes are all that can be asked for
    if not operands:
        return _bends_without_operands(program)
    middle = [o.detach().double().mean().cpu() if isinstance(o, Tensor) and o.is_floating_point() else o for o in operands]
    return _bends(lambda u: run(program, u, middle))


@functools.cache
def _bends_without_operands(program: Program) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    return _bends(lambda u: run(program, u, ()))


def _bends(fn: Callable[[Tensor], Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    check_elementwise(fn)
    u = torch.arange(-_REACH, _REACH + 0.25, 0.25, dtype=torch.float64)
    with torch.no_grad():
        finite = bool(fn(u).isfinite().all())
    # Off the round numbers, where a derivative may well be missing.
    finite = finite and bool(torch.func.grad(lambda x: fn(x).sum())(u + 0.1).isfinite().all())
    points = find_breakpoints(fn, -_FAR, _FAR) if finite else None
    if points is None or not points.resolved:
        return None
    return tuple(e for e in points.edges if e not in _LADDER), points.jumps
