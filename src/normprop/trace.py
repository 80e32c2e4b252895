"""A model as a torch.fx graph whose leaves are what the moment rules know."""

from __future__ import annotations

import inspect
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from normprop.errors import TracingError
from normprop.rules.table import RuleTable

Leaf = str | type[nn.Module] | nn.Module


class LeafTracer(fx.Tracer):
    """Traces into everything but torch.nn modules, modules with a moment rule, and the caller's own leaves.

    Args:
        table: modules which have a rule in it stay whole, and so do Python functions which have one.
        leaf_modules: further leaves, given as classes, modules or dotted paths.
        leaf_functions: Python functions not to enter.
        expansions: module class → function ``(module, call, *inputs)`` that writes the module as several calls, where
            ``call`` runs the module under its own path as its base class (a BatchNorm with an activation inside becomes two).
    """

    def __init__(
        self,
        table: RuleTable,
        leaf_modules: Sequence[Leaf] = (),
        leaf_functions: Sequence[Callable[..., Any]] = (),
        expansions: dict[type[nn.Module], Callable[..., Any]] | None = None,
    ) -> None:
        functions = (k for k in table if isinstance(k, types.FunctionType) and not k.__module__.startswith("torch."))
        super().__init__(autowrap_functions=(*functions, *leaf_functions))
        self.table = table
        self.leaves = tuple(leaf_modules)
        self.expansions = expansions or {}

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

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
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


def _source_line() -> str:
    """``file:line`` of the innermost frame outside torch and this file."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not (name == __name__ or name == "torch" or name.startswith("torch.")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def trace(
    model: nn.Module,
    table: RuleTable,
    *,
    leaf_modules: Sequence[Leaf] = (),
    leaf_functions: Sequence[Callable[..., Any]] = (),
    expansions: dict[type[nn.Module], Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """The model as a GraphModule that shares its modules; inputs with a default keep it.

    Raises:
        TracingError: the model's control flow depends on values; the message gives the line.
    """
    tracer = LeafTracer(table, leaf_modules, leaf_functions, expansions)
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        graph = tracer.trace(model, concrete_args=defaults or None)
    except Exception as error:
        raise TracingError(_explain(model, error)) from error
    for node in reversed(graph.nodes):  # the checks that fx writes for inputs fixed at their defaults
        fixed = node.op == "call_function" and node.target in (torch._assert, fx._symbolic_trace._assert_is_none)
        if fixed and not node.users:
            graph.erase_node(node)
    _restore_defaults(graph, defaults)
    graph._codegen = fx.graph.CodeGen()
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


def _restore_defaults(graph: fx.Graph, defaults: dict[str, Any]) -> None:
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        name = str(node.target)
        original = next((d for d in defaults if name == d or name.startswith(f"{d}_")), None)
        if original is None:
            continue
        for user in list(node.users):  # comparisons with the default that only fed an assertion
            if not user.users and user.op == "call_function":
                graph.erase_node(user)
        node.target = original
        node.args = (defaults[original],)


def _explain(model: nn.Module, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    torch_folder = str(torch.__path__[0])
    own = [f for f in frames if not f.filename.startswith(torch_folder) and f.filename != __file__]
    place = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "an unknown line"
    return (
        f"{type(model).__name__} cannot be traced: {str(error).splitlines()[0]}\n"
        f"  at {place}\n"
        "Keep the module that does this whole with leaf_modules=(…,) and give it a rule with @normprop.rule, "
        "or rewrite the line without control flow on values."
    )
