"""By what names rules know the functions that torch dispatches."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from normprop.rules.table import RuleTable

# Reflected operators, and others that have a public function of the same meaning.
_OPERATORS: dict[str, Any] = {
    "__rsub__": torch.rsub,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__matmul__": operator.matmul,
    "__pow__": "pow",
    "__truediv__": operator.truediv,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__invert__": operator.invert,
}
_REFLECTED = {
    "__rtruediv__": operator.truediv,
    "__rdiv__": operator.truediv,
    "__rpow__": operator.pow,
    "__rmatmul__": operator.matmul,
    "__radd__": operator.add,
    "__rmul__": operator.mul,
    "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod,
}
_RANDOM = frozenset("rand randn randint randperm normal bernoulli multinomial poisson".split())
# Names that torch takes for its own, too.
NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}
# These ask a tensor for its size alone: their values are made anew.
_RANDOM_LIKE = frozenset("rand_like randn_like randint_like".split())
_RANDOM_IN_PLACE = frozenset("bernoulli_ normal_ uniform_ random_ exponential_ geometric_ log_normal_ cauchy_".split())
RANDOM_OVER = _RANDOM_LIKE | _RANDOM_IN_PLACE


def target_of(func: Any, args: tuple[Any, ...], table: RuleTable) -> tuple[Any, tuple[Any, ...]]:
    """How rules know what torch dispatched: the function, the method's name, or `getattr` with a name; "" for nothing."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr, (args[0], func.__self__.__name__)
    if name in ("__set__", "__delete__"):
        return "", args
    if table.for_function(func) is not None:
        return func, args
    if name in _REFLECTED and len(args) == 2:
        return _REFLECTED[name], (args[1], args[0])
    if name in _OPERATORS:
        return _OPERATORS[name], args
    if name.startswith("__i") and name.endswith("__"):
        return f"{name[3:-2]}_", args
    if name.startswith("__") and name.endswith("__"):
        return getattr(operator, name, name), args
    own = getattr(Tensor, name, None)
    method = own is func or getattr(func, "__objclass__", None) is not None or func.__module__ == "torch._tensor"
    return (name if method and own is not None else func), args


def is_mask(x: Any, index: Any, value: Any) -> bool:
    """Whether ``x[index] = value`` puts a number wherever the index, of the same shape, is true."""
    return (
        isinstance(index, Tensor) and index.dtype == torch.bool and index.shape == x.shape and not isinstance(value, Tensor)
    )


def is_random(name: str) -> bool:
    """Whether a function makes random numbers."""
    return name in _RANDOM or name in RANDOM_OVER
