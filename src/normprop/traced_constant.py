"""Functions whose result a graph takes for a constant while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def traced_constant(function: _Function) -> _Function:
    """Have `torch.compile` call a function once, while it traces, and write what it returns into the graph.

    All that ``torch.compiler.assume_constant_result`` does; calling that would import the compiler, which takes a second.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function
