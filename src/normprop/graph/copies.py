"""Copies of a model for conversion and for tracing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def independent_copy(model: nn.Module) -> nn.Module:
    """A deep copy; tensors that a forward left in a module's attributes are copied without their history.

    Attention layers that cache a bias in eval mode hold such tensors, and `copy.deepcopy` refuses them.
    """
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in _left_behind(model)}
    return copy.deepcopy(model, memo)


def tracing_copy(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers, for tracing: what a forward writes into attributes stays in the copy."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers(), *_left_behind(model))}
    return copy.deepcopy(model, memo)


def _left_behind(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in module.__dict__.values():
            entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            yield from (t for t in entries if isinstance(t, Tensor) and not t.is_leaf)
