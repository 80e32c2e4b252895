"""Sums, products, powers."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import nn

from normprop.rules import TABLE, arithmetic
from normprop.rules.table import describe
from tests.rules.case import Case

_PAIR = [(3, 2), (3, 2)]
_FACTOR = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64).reshape(3, 1)


def _apply(key: Any, arguments: tuple[Any, ...], *inputs: Any) -> Any:
    first, *rest = inputs
    return getattr(first, key)(*rest, *arguments) if isinstance(key, str) else key(*inputs, *arguments)


def _every(function: Any, *arguments: Any, shapes: Any = None, **options: Any) -> dict[str, Case]:
    """A case for every key which a rule serves."""
    keys = [k for k, rule in TABLE.items() if rule.function is function]
    shapes = shapes or [(3, 2)]
    return {describe(k): Case(functools.partial(_apply, k, arguments), shapes, **options) for k in keys}


class Scale(nn.Module):
    """A layer scale: γ · x."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(_FACTOR.clone())

    def forward(self, x: Any) -> Any:
        return x * self.gamma


_NEAR = {"exact": False, "tolerance": 0.05, "positive": True}
CASES = {
    **_every(arithmetic.add, shapes=_PAIR),
    **_every(arithmetic.sub, shapes=_PAIR),
    **_every(arithmetic.rsub, shapes=_PAIR),
    **_every(arithmetic.mul, shapes=_PAIR),
    **_every(arithmetic.div, 2.0),
    **_every(arithmetic.neg),
    **_every(arithmetic.addcmul, shapes=[(3, 2)] * 3),
    **_every(arithmetic.lerp, 0.3, shapes=_PAIR),
    **_every(arithmetic.maximum, shapes=_PAIR),
    **_every(arithmetic.minimum, shapes=_PAIR),
    **_every(arithmetic.power, 2),
    **_every(arithmetic.sqrt, **_NEAR),
    **_every(arithmetic.rsqrt, **_NEAR),
    **_every(arithmetic.reciprocal, **_NEAR),
    **_every(arithmetic.log, **_NEAR),
    **_every(arithmetic.log1p, **_NEAR),
    **_every(arithmetic.floordiv, 0.1, exact=False, tolerance=0.05),
    "add with alpha": Case(lambda x, y: torch.add(x, y, alpha=-0.5), _PAIR),
    "add by keywords": Case(lambda x, y: torch.add(input=x, other=y), _PAIR),
    "a constant minus": Case(lambda x: 1.0 - x, [(3, 2)]),
    "twice itself": Case(lambda x: x + x, [(3, 2)]),
    "minus itself": Case(lambda x: x - x, [(3, 2)]),
    "its own square": Case(lambda x: x * x, [(3, 2)]),
    "layer scale": Case(Scale(), [(3, 2)]),
    "a parameter plus": Case(lambda x: operator.add(_FACTOR, x), [(3, 2)]),
    "a constant over": Case(lambda x: 2.0 / x, [(3, 2)], **_NEAR),
    "a ratio": Case(lambda x, y: x / y, _PAIR, **_NEAR),
    "cube": Case(lambda x: x**3, [(3, 2)], samples=200000),
    "first power": Case(lambda x: x.pow(1), [(3, 2)]),
    "root as a power": Case(lambda x: x**0.5, [(3, 2)], **_NEAR),
    "maximum with a number": Case(lambda x: torch.maximum(x, _FACTOR), [(3, 2)]),
    "gate of another rank": Case(lambda x, y: x * y, [(3, 2, 2), (3, 1, 1)]),
    "addcmul of constants": Case(lambda x: torch.addcmul(x, _FACTOR, _FACTOR, value=0.5), [(3, 2)]),
}
