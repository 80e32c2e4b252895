"""A model as a torch.fx graph whose leaves are what the moment rules know."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from normprop.errors import TracingError
from normprop.rules.table import RuleTable

_OURS = ("normprop.graph.trace", "normprop.graph.sized")  # frames that are not the model's

Leaf = str | type[nn.Module] | nn.Module


class LeafTracer(fx.Tracer):
    """Traces into everything but torch.nn modules, modules with a moment rule, and the caller's own leaves.

    Args:
        table: modules which have a rule in it stay whole, and so do Python functions which have one.
        leaf_modules: further leaves, given as classes, modules or dotted paths.
        leaf_functions: Python functions not to enter.
        expansions: module class → function ``(module, call, *inputs)`` that writes the module as several calls, where
            ``call`` runs the module under its own path as its base class (a BatchNorm with an activation becomes two).
    """

    def __init__(
        self,
        table: RuleTable,
        leaf_modules: Sequence[Leaf] = (),
        leaf_functions: Sequence[Callable[..., Any]] = (),
        expansions: dict[type[nn.Module], Callable[..., Any]] | None = None,
    ) -> None:
        keys = (_imported(k) if isinstance(k, str) else k for k in table)
        functions = (k for k in keys if isinstance(k, types.FunctionType) and not k.__module__.startswith("torch."))
        super().__init__(autowrap_functions=(*functions, *leaf_functions))
        self.table = table
        self.leaves = tuple(leaf_modules)
        self.expansions = expansions or {}

    def create_args_for_root(
        self,
        root_fn: Any,  # noqa: ARG002  fx's signature
        is_module: bool,  # noqa: ARG002  fx's signature
        concrete_args: Any = None,  # noqa: ARG002  fx's signature
    ) -> tuple[Any, list[Any]]:
        """An input for every parameter of ``forward``; one with a default is fixed at it, and checked.

        ``*args`` and ``**kwargs`` are empty. Inputs without a default come first.
        """
        forward: Callable[..., Any] = self.root.forward  # an instance may carry its own
        parameters = inspect.signature(forward).parameters.values()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = [p for p in parameters if p.kind not in variadic]
        given = {p.name: self.create_proxy("placeholder", p.name, (), {}) for p in named if p.default is p.empty}
        for p in named:
            if p.default is not p.empty:
                given[p.name] = p.default
                self._fix(p.name, p.default)
        positional = [given.pop(p.name) for p in named if p.kind is not p.KEYWORD_ONLY]
        return functools.partial(forward, *positional, **given), []

    def _fix(self, name: str, default: Any) -> None:
        """An input that only takes its default; one whose default cannot stand in code is no input at all."""
        if default is not None and not isinstance(default, bool | int | float | str):
            return
        proxy = self.create_proxy("placeholder", name, (default,), {})
        same = self.create_proxy("call_function", operator.is_ if default is None else operator.eq, (proxy, default), {})
        message = f"the network was converted with {name}={default!r} and takes nothing else there"
        self.create_proxy("call_function", torch._assert, (same, message), {})

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See the class."""
        if super().is_leaf_module(m, module_qualified_name) or self.table.for_module(m) is not None:
            return True
        return any(
            leaf == module_qualified_name if isinstance(leaf, str)
            else isinstance(m, leaf) if isinstance(leaf, type)
            else m is leaf
            for leaf in self.leaves
        )  # fmt: skip

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write a module's call, or the several calls it stands for."""
        expand = self.expansions.get(type(m))
        if expand is None:
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        return expand(m, lambda *inputs: self.create_proxy("call_module", path, inputs, {}), *args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that remembers the line of the model's source it comes from."""
        node = super().create_node(*args, **kwargs)
        node.meta["source"] = _source_line()
        node.meta["scope"] = next(reversed(self.module_stack), "") if self.module_stack else ""
        return node


def _imported(name: str) -> Any:
    """What a dotted name stands for, if its module is loaded."""
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules.get(module), attribute, None)


def _source_line() -> str:
    """``file:line`` of the innermost frame outside torch and this file."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in _OURS and name != "torch" and not name.startswith("torch."):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def trace(model: nn.Module, tracer: LeafTracer) -> fx.GraphModule:
    """The model as a GraphModule that shares its modules; inputs with a default keep it.

    Raises:
        TracingError: the model's control flow depends on values; the message gives the line.
    """
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise TracingError(_explain(model, error)) from error
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


def _explain(model: nn.Module, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    torch_folder = str(torch.__path__[0])
    ours = tuple(str(Path(__file__).with_name(f"{name.rpartition('.')[2]}.py")) for name in _OURS)
    own = [f for f in frames if not f.filename.startswith((torch_folder, *ours))]
    place = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "an unknown line"
    return (
        f"{type(model).__name__} cannot be traced: {str(error).splitlines()[0]}\n"
        f"  at {place}\n"
        "Keep the module that does this whole with leaf_modules=(…,) and give it a rule with @normprop.rule, "
        "or rewrite the line without control flow on values."
    )
