"""`normprop moments`."""

from __future__ import annotations

import math
from json import dumps
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import nn

from normprop.activations.activation_moments import ActivationMoments
from normprop.activations.activation_moments import moments as moments_of
from normprop.errors import NormPropError
from normprop.lab.commands.console import console, on_screen
from normprop.lab.pages.text_table import Table

_COLUMNS = ("mean", "std", "second", "slope", "gain", "jacobian", "error")


def moments(
    functions: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    mean: float = 0.0,
    std: float = 1.0,
    json: bool = False,
) -> None:
    """Moments of f(u) for u ~ N(mean, std²), for each function f.

    A function is a name (gelu, silu, relu …) or a Python expression, which is evaluated as typed, with torch, nn, F
    (torch.nn.functional) and math in scope: 'lambda x: x*x', 'nn.LeakyReLU(0.2)', 'F.hardswish'.

    mean and std are those of f(u); second is E f(u)²; slope is E f'(u)²; gain is 1/std; jacobian is √(slope/var), the
    factor by which a layer scales gradients once its output is standardised; error bounds the error of all of them.

    Args:
        functions: Names or expressions.
        mean: Mean of u.
        std: Standard deviation of u.
        json: Print JSON instead of a table.
    """
    if not functions:
        raise NormPropError("No function to take moments of.\nName one: normprop moments relu gelu 'lambda x: x*x'.")
    if not (math.isfinite(mean) and math.isfinite(std)) or std <= 0:
        raise NormPropError(f"u can't have mean {mean} and standard deviation {std}.\n--std must be above 0.")
    rows = [_row(text, mean, std) for text in functions]
    if json:
        print(_as_json(rows))
        return
    cells = [(row["function"], *(_digits(row[name]) for name in _COLUMNS[:-1]), f"{row['error']:.0e}") for row in rows]
    console().print(on_screen(Table(("f", *_COLUMNS), cells, f"f(u) for u ~ N({mean:g}, {std:g}²)")))


def _row(text: str, mean: float, std: float) -> dict[str, Any]:
    m = moments_of(text, mean, std) if text.isidentifier() else _typed(text, mean, std)
    var, slope = float(m.var), float(m.slope)
    jacobian = math.sqrt(slope / var) if var else math.nan
    numbers = (float(m.mean), math.sqrt(var), float(m.second), slope, float(m.gain), jacobian, float(m.error))
    return {"function": text, **dict(zip(_COLUMNS, numbers, strict=True))}


def _typed(text: str, mean: float, std: float) -> ActivationMoments:
    function = _evaluated(text)
    try:
        return moments_of(function, mean, std)
    except NormPropError:
        raise
    except Exception as error:  # whatever the typed function may raise
        raise NormPropError(f"{text!r} fails on a tensor: {error}.\nIt must act on each element alone.") from error


def _evaluated(text: str) -> Any:
    scope = {"torch": torch, "F": F, "math": math, "nn": nn}
    try:
        function = eval(text, scope)
    except Exception as error:
        raise NormPropError(
            f"{text!r} can't be evaluated: {error}.\nPass a name, or a Python expression for a function of a tensor."
        ) from error
    if not callable(function):
        raise NormPropError(f"{text!r} is {type(function).__name__}, not a function.\nWrite 'lambda x: …'.")
    return function


def _digits(number: float) -> str:
    return f"{number:.6f}" if number == 0 or 1e-4 <= abs(number) < 1e6 else f"{number:.6g}"


def _as_json(rows: list[dict[str, Any]]) -> str:
    # JSON has no infinity: E f'² of a function that jumps becomes null.
    finite = [{k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in row.items()} for row in rows]
    return dumps(finite)
