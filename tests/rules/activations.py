"""Activations as modules, functions and methods."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normprop.rules import TABLE
from normprop.rules.elementwise import module_activation, named_activation
from normprop.rules.table import describe
from tests.rules.case import Case

_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "leaky_relu": (0.2,), "elu": (0.7,), "celu": (0.7,), "hardtanh": (-0.5, 0.8), "hardshrink": (0.3,), "softshrink": (0.3,),
    "softplus": (2.0, 20.0), "threshold": (0.2, -0.4), "clamp": (-0.5, 0.8), "clamp_min": (0.1,), "clamp_max": (0.3,),
    "prelu": (torch.tensor([0.1, 0.25, 0.4], dtype=torch.float64),), "rrelu": (0.1, 0.3),
    "heaviside": (torch.tensor(0.5, dtype=torch.float64),), **dict.fromkeys(("gt", "ge", "lt", "le"), (0.2,)),
}  # fmt: skip
_MODULES = {
    nn.LeakyReLU: (0.2,), nn.ELU: (0.7,), nn.CELU: (0.7,), nn.Hardtanh: (-0.5, 0.8), nn.Hardshrink: (0.3,),
    nn.Softshrink: (0.3,), nn.Softplus: (2.0,), nn.Threshold: (0.2, -0.4), nn.PReLU: (3,),
}  # fmt: skip


def _apply(key: Any, arguments: tuple[Any, ...], x: Any) -> Any:
    return getattr(x, key)(*arguments) if isinstance(key, str) else key(x, *arguments)


CASES = {}
for _key, _rule in TABLE.items():
    if _rule.function is named_activation:
        _call = functools.partial(_apply, _key, _ARGUMENTS.get(_rule.leading[0], ()))
        CASES[describe(_key)] = Case(_call, [(3,)], samples=100000)
    elif _rule.function is module_activation and isinstance(_key, type):
        CASES[_key.__name__] = Case(_key(*_MODULES.get(_key, ())), [(3, 2)], samples=50000)

CASES |= {
    "gelu tanh": Case(lambda x: F.gelu(x, approximate="tanh"), [(3,)], samples=100000),
    "clamp by keywords": Case(lambda x: torch.clamp(input=x, min=-0.2, max=0.5), [(3,)], samples=100000),
    "relu by keyword": Case(lambda x: F.relu(input=x, inplace=False), [(3,)]),
    "PReLU of one slope": Case(nn.PReLU(init=0.1), [(3, 2)], samples=50000),
    "GLU": Case(nn.GLU(1), [(4, 2)], samples=50000),
    "glu": Case(lambda x: F.glu(x, dim=1), [(4,)], samples=100000),
}
