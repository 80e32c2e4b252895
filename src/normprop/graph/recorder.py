"""What a network does in one forward, recorded while it runs: its own code, its own hooks, its own path."""

from __future__ import annotations

import contextlib
import operator
import sys
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from normprop.graph.dispatched_names import NUMPY_NAMES, RANDOM_OVER, is_mask, is_random, target_of
from normprop.graph.node import HERE, Node, nodes_in, written
from normprop.graph.record import Record
from normprop.graph.shared_memory import on_meta, sizes, storage_of, tensors_in
from normprop.graph.tensor_nodes import TensorNodes
from normprop.graph.unrecorded import ACTIVE, untouched
from normprop.rules.table import RuleTable, describe

Leaf = str | type[nn.Module] | nn.Module
Expansion = Callable[..., Any]

# These give a tensor the size or kind of another, of which they read nothing else.
_ALIKE = {"expand_as": "expand", "view_as": "reshape", "reshape_as": "reshape", "type_as": "to", "to": "to"}


class Recorder(TorchFunctionMode):
    """Records a network while it runs.

    Functions are seen by torch's own dispatch, modules by hooks that keep a stack, tensors are known by identity. A tensor
    whose maker was not seen is nobody's constant: it becomes an "unseen" node.

    Args:
        model: the network. Its modules get hooks for the time of the record.
        table: modules with a rule in it are kept whole.
        leaf_modules: further modules to keep whole, as classes, modules or paths.
        expansions: class → function ``(module, call, *inputs)`` that runs a module as several; see `Integration`.
        observer: gets name and value of every operation on data.
    """

    def __init__(
        self,
        model: nn.Module,
        table: RuleTable,
        leaf_modules: Sequence[Leaf] = (),
        expansions: Mapping[type[nn.Module], Expansion] | None = None,
        observer: Callable[[str, Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.record = Record(model)
        self.table = table
        self.leaves = tuple(leaf_modules)
        self.expansions = expansions or {}
        self.observer = observer
        self.tensors = TensorNodes(model, self._add, self.record.nodes.append)
        self.scopes = [""]
        self.within = 0
        self.gradients = True
        self.names: Counter[str] = Counter()
        # Target and input nodes of the operation that is going on, for whoever asks why a run ended.
        self.pending: tuple[Any, tuple[Node, ...]] | None = None

    def run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str] = (), *, gradients: bool = True
    ) -> Record:
        """Run the network and return what it did.

        Args:
            args: of the forward.
            kwargs: of the forward.
            names: of the positional arguments, for people.
            gradients: run with gradients switched on, so that regions without are seen.
        """
        self.gradients = gradients
        self._take_inputs(args, kwargs, names)
        with untouched(gradients), contextlib.ExitStack() as stack:
            for path, module in self.record.model.named_modules():
                self._watch(stack, path, module)
            for function in self._functions():
                self._wrap(stack, function)
            stack.callback(ACTIVE.pop)
            ACTIVE.append(self)
            stack.enter_context(self)
            output = self.record.model(*args, **kwargs)
        self.record.output = self.tensors.nodes_for(output)
        self.record.drop_unused()
        for node in self.record.nodes:
            node.value = pytree.tree_map_only(Tensor, lambda t: t if t.is_meta else on_meta(t), node.value)
        return self.record

    def _take_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str]) -> None:
        for i, value in enumerate((*args, *kwargs.values())):
            name = (names[i] if i < len(names) else f"input_{i}") if i < len(args) else list(kwargs)[i - len(args)]
            tensors = tensors_in(value)
            for k, tensor in enumerate(tensors):
                node = Node("input", name, value=tensor, data=True)
                node.name = self._name(name if len(tensors) == 1 else f"{name}_{k}")
                self.record.nodes.append(node)
                self.record.inputs.append(node)
                self.tensors.bind(tensor, node)
                if self.observer is not None:
                    self.observer(node.name, tensor)

    # Modules

    def _watch(self, stack: contextlib.ExitStack, path: str, module: nn.Module) -> None:
        """Hooks that keep the stack of modules and note the leaves, inside those of the user's own hooks.

        Hooks of the backward are out of the way meanwhile: for them torch wraps inputs and outputs where nobody sees it.
        """
        for name in ("_backward_hooks", "_backward_pre_hooks"):
            if hooks := module.__dict__[name]:
                module.__dict__[name] = OrderedDict()
                stack.callback(module.__dict__.__setitem__, name, hooks)
        expansion = next((e for c, e in self.expansions.items() if type(module) is c), None)
        if expansion is not None:
            module.__dict__["forward"] = _Expanded(self, path, module, expansion)
            stack.callback(module.__dict__.pop, "forward", None)
        leaf = expansion is None and self._is_leaf(path, module)

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.record.called.add(path)
            if self.within:
                self.within += 1
                return
            self.scopes.append(path)
            if leaf:
                self.within = 1
                with torch._C.DisableTorchFunction():
                    self.pending = path, tuple(nodes_in((self.tensors.nodes_for(args), self.tensors.nodes_for(kwargs))))

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.within > 1:
                self.within -= 1
                return
            self.scopes.pop()
            if leaf:
                self.within = 0
                self.note("module", path, args, kwargs, output)

        enter.unrecorded = leave.unrecorded = True  # type: ignore[attr-defined]  # a function takes any attribute
        stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        # Also after an exception, which the user's code may catch.
        stack.callback(module.register_forward_hook(leave, with_kwargs=True, prepend=True, always_call=True).remove)

    def _is_leaf(self, path: str, module: nn.Module) -> bool:
        if self.table.for_module(module) is not None:
            return True
        return any(
            leaf == path if isinstance(leaf, str) else isinstance(module, leaf) if isinstance(leaf, type) else module is leaf
            for leaf in self.leaves
        )

    # Python functions that have a rule

    def _functions(self) -> Iterator[types.FunctionType]:
        """Python functions of other libraries, or the user's, that have a rule: torch doesn't dispatch them."""
        for key in self.table:
            found: Any = key
            if isinstance(key, str) and "." in key:
                module, _, name = key.rpartition(".")
                found = getattr(sys.modules.get(module), name, None)
            if isinstance(found, types.FunctionType) and not found.__module__.startswith("torch."):
                yield found

    def _wrap(self, stack: contextlib.ExitStack, function: types.FunctionType) -> None:
        """Have calls of the function noted, under every name that the network's modules know it by."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            if self.within:
                return function(*args, **kwargs)
            self.within = 1
            try:
                result = function(*args, **kwargs)
            finally:
                self.within = 0
            self.note("call", function, args, kwargs, result)
            return result

        spaces = [
            forward.__globals__
            for module in self.record.model.modules()
            if hasattr(forward := cast(Any, type(module)).forward, "__globals__")
        ]
        for space in {id(s): s for s in (*spaces, function.__globals__)}.values():
            for name in [name for name, value in space.items() if value is function]:
                space[name] = noted
                stack.callback(space.__setitem__, name, function)

    # Operations

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.within:
            return _copied(func, func(*self.tensors.alike(args), **self.tensors.alike(kwargs)))
        given = tensors_in((args, kwargs))
        self.pending = func, tuple(self.tensors.known[id(t)][1] for t in given if id(t) in self.tensors.known)
        alike, named = self.tensors.alike(args), self.tensors.alike(kwargs)
        run = tensors_in((alike, named))
        versions = [t._version for t in run]
        result = _copied(func, func(*alike, **named))
        changed = [(t, r) for t, r, version in zip(given, run, versions, strict=True) if r._version != version]
        if not changed and not tensors_in(result):
            return result
        target, args = target_of(func, args, self.table)
        kwargs = {NUMPY_NAMES.get(name, name): value for name, value in kwargs.items()}
        if target == "" or (target is getattr and args[1] in ("grad", "shape")):
            return result
        written = bool(changed) and result is None and changed[0][0] is (args[0] if args else None)
        self.note("call", target, args, kwargs, changed[0][0] if written else result)
        if target is operator.getitem and isinstance(result, Tensor) and storage_of(result) == storage_of(given[0]):
            self.tensors.parts[id(result)] = given[0], args[1]
        returned = {id(t) for t in tensors_in(result)}
        noted = {storage_of(t) for t in ([changed[0][0]] if written else tensors_in(result))}
        for tensor, twin in changed[written:]:
            if id(twin) in returned and twin is not tensor:  # what was returned stands for it
                self.tensors.bind(tensor, self.tensors.known[id(twin)][1])
            elif id(tensor) not in returned and storage_of(tensor) not in noted:
                self.tensors.bind(tensor, self._changed(target, tensor))
        for tensor, twin in changed:
            if twin is not tensor:
                self.tensors.overwritten.add(id(tensor))
            if id(tensor) in returned or tensor is changed[0][0] or storage_of(tensor) not in noted:
                self.tensors.spread(tensor)
        return result

    def _changed(self, target: Any, tensor: Tensor) -> Node:
        """What an operation made of a tensor that it changed and did not return."""
        return self._add("call", f"in-place change by {describe(target)}", (self.tensors.node_of(tensor),), {}, tensor)

    def note(self, op: Any, target: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Add an operation, and know the tensors that it returned."""
        if not tensors_in(result):
            return
        with torch._C.DisableTorchFunction():
            name = target if isinstance(target, str) else getattr(target, "__name__", "")
            if op == "call" and is_random(name):
                args, kwargs = args[name in RANDOM_OVER :], {**kwargs, "dtype": result.dtype, "device": HERE}
            if target is operator.setitem and is_mask(*args):
                target = "masked_fill_"
            if target == "copy_":
                target, args, kwargs = "expand", (args[1], tuple(result.shape)), {}
            if name in _ALIKE and len(args) == 2 and isinstance(args[1], Tensor) and not self.tensors.node_of(args[0]).data:
                target = _ALIKE[name]
                args = args[0], result.dtype if target == "to" else tuple(result.shape)
            node = self._add(op, target, self.tensors.nodes_for(args), self.tensors.nodes_for(kwargs), result)
            self.tensors.bind_all(result, node)

    def _add(self, op: Any, target: Any, args: Any, kwargs: Any, value: Any) -> Node:
        if target is operator.setitem and not any(n.data for n in nodes_in(args)):
            target = written
        node = Node(op, target, args, kwargs, sizes(value), scope=self.scopes[-1], source=_source())
        node.detached = self.gradients and not torch.is_grad_enabled()
        name = target if isinstance(target, str) else getattr(target, "__name__", "call")
        node.data = any(n.data for n in node.inputs) or op == "unseen" or is_random(name)
        if node.data:
            node.name = self._name(name if op == "module" else f"{node.scope}.{name}".lstrip("."))
        if op == "module":
            node.scope = target
        self.record.nodes.append(node)
        if self.observer is not None and node.data:
            self.observer(node.name, value)
            node.value = None
        return node

    def _name(self, wanted: str) -> str:
        wanted = wanted.replace(".", "_")
        self.names[wanted] += 1
        return wanted if self.names[wanted] == 1 else f"{wanted}_{self.names[wanted] - 1}"


def _copied(function: Any, result: Any) -> Any:
    """What a function returns, in memory of its own where a CPU gives it that and the meta device may not."""
    return result.clone() if function is torch.channel_shuffle else result


class _Expanded:
    """Stands for the forward of a module that is several operations: one under its own path, then its children."""

    def __init__(self, recorder: Recorder, path: str, module: nn.Module, expansion: Expansion) -> None:
        self.recorder, self.path, self.module, self.expansion = recorder, path, module, expansion

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.expansion(self.module, self._call, *args, **kwargs)

    def _call(self, compute: Callable[..., Any], *inputs: Any) -> Any:
        """Compute the module's own part and note it under the module's path."""
        if self.recorder.within:
            return compute(*inputs)
        self.recorder.within = 1
        try:
            result = compute(*inputs)
        finally:
            self.recorder.within = 0
        self.recorder.note("module", self.path, inputs, {}, result)
        return result


def _source() -> str:
    """``file:line`` of the innermost frame outside torch and this package."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        own = name.startswith("normprop.") and not name.startswith("normprop.lab.")
        if not own and not name.startswith("torch.") and name not in ("torch", "contextlib"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
