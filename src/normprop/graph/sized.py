"""Tracing where sizes are known: control flow on shapes is decided by an example and guarded in the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.proxy import Attribute, TraceError

from normprop.graph.trace import LeafTracer


class _Unknown:
    """The value of a node that the meta device cannot give."""


UNKNOWN = _Unknown()


class SizedProxy(fx.Proxy):
    """A proxy that becomes a number where Python needs one; the tracer notes on what that rests."""

    def __getattr__(self, name: str) -> Attribute:
        return SizedAttribute(self, name)

    def __len__(self) -> int:
        return len(_tracer(self).value(self.node))

    def __int__(self) -> int:
        return int(_tracer(self).fixed(self))

    def __float__(self) -> float:
        return float(_tracer(self).fixed(self))

    def __index__(self) -> int:
        return operator.index(_tracer(self).fixed(self))


class SizedAttribute(Attribute, SizedProxy):
    """An attribute of a proxy, such as its shape."""


def _tracer(proxy: fx.Proxy) -> SizedTracer:
    assert isinstance(proxy.tracer, SizedTracer)
    return proxy.tracer


class SizedTracer(LeafTracer):
    """A `LeafTracer` that runs every operation on meta tensors as it goes.

    Sizes stay symbolic, so that the graph serves any input for which the model takes the same branches. Where a branch,
    a loop or an index asks for a number, the example's is taken and ``torch._assert`` is written into the graph: an
    input that would need another branch is refused, not computed wrongly.

    Args:
        inputs: example inputs on the meta device, in order.
        arguments: those of `LeafTracer`.
    """

    def __init__(self, inputs: Sequence[Tensor], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inputs = iter(inputs)
        self.values: dict[fx.Node, Any] = {}
        self.meta_tensors: dict[int, Tensor] = {}
        self.running = False
        self.guarded: set[fx.Node] = set()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """See `SizedProxy`."""
        return SizedProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node whose value on the meta device is known."""
        node = super().create_node(*args, **kwargs)
        self.values[node] = self._run(node)
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a module's call, unless it is only run for its value."""
        return forward(*args, **kwargs) if self.running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter's proxy, or the parameter itself while a module is run for its value."""
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def value(self, node: fx.Node) -> Any:
        """A node's value; TraceError if the meta device cannot give it."""
        value = self.values[node]
        if value is UNKNOWN:
            raise TraceError(f"the value of {node.name} is needed, not only its shape")
        return value

    def fixed(self, proxy: fx.Proxy) -> Any:
        """A number, with a guard that it stays what it is."""
        value = self.value(proxy.node)
        if isinstance(value, Tensor):
            raise TraceError(f"the value of {proxy.node.name} is needed, not only its shape")
        self._guard(proxy.node, operator.eq, value)
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The example's branch, with a guard."""
        value = self.value(obj.node)
        if isinstance(value, Tensor):
            raise TraceError(f"control flow depends on the value of {obj.node.name}")
        self._guard(obj.node, operator.truth if value else operator.not_)
        return bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """As many entries as the example has."""
        entries: Any = obj
        return iter([entries[i] for i in range(len(self.value(obj.node)))])

    def _guard(self, node: fx.Node, check: Callable[..., Any], *expected: Any) -> None:
        if node in self.guarded or not any(n.op == "placeholder" for n in _upstream(node)):
            return
        self.guarded.add(node)
        holds = self.create_node("call_function", check, (node, *expected), {})
        message = f"converted for inputs of other sizes: {Path(holds.meta['source']).name} would take another way"
        self.create_node("call_function", torch._assert, (holds, message), {})

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return node.args[0] if node.args else next(self.inputs)
        if node.op == "output":
            return None
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        self.running = True
        try:
            with torch.no_grad(), torch.device("meta"):
                return self._result(node, args, kwargs)
        except Exception:  # a value the meta device cannot give; only control flow needs it
            return UNKNOWN
        finally:
            self.running = False

    def _result(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        path = str(node.target)
        if node.op == "get_attr":
            parent, _, name = path.rpartition(".")
            value = getattr(self.root.get_submodule(parent), name)
            return self._on_meta(value) if isinstance(value, Tensor) else value
        module = self.root.get_submodule(path)
        tensors = {k: self._on_meta(v) for k, v in (*module.named_parameters(), *module.named_buffers())}
        return functional_call(module, tensors, args, kwargs)

    def _on_meta(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.meta_tensors:
            self.meta_tensors[id(tensor)] = torch.empty_like(tensor, device="meta")
        return self.meta_tensors[id(tensor)]


def _upstream(node: fx.Node) -> set[fx.Node]:
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found
