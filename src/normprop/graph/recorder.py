"""What a network does in one forward, recorded while it runs: its own code, its own hooks, its own path."""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import sys
import types
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from normprop.graph.node import HERE, Node, nodes_in, written
from normprop.rules.table import RuleTable, describe

Leaf = str | type[nn.Module] | nn.Module
Expansion = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])

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
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}
# These ask a tensor for its size alone: their values are made anew.
_RANDOM_LIKE = frozenset("rand_like randn_like randint_like".split())
_RANDOM_IN_PLACE = frozenset("bernoulli_ normal_ uniform_ random_ exponential_ geometric_ log_normal_ cauchy_".split())
_RANDOM_OVER = _RANDOM_LIKE | _RANDOM_IN_PLACE
# These give a tensor the size or kind of another, of which they read nothing else.
_ALIKE = {"expand_as": "expand", "view_as": "reshape", "reshape_as": "reshape", "type_as": "to", "to": "to"}
_WRITES = (operator.setitem, "in-place change of a view")
_MEMORY = ("new_empty", "empty_like", torch.empty_like, torch.empty)  # of no values


@dataclass
class Record:
    """The operations of one forward, in order.

    Attributes:
        model: the network that ran; paths of modules and parameters are its own.
        nodes: every operation that returned or changed a tensor.
        inputs: the tensors that the network was given, in the order of its arguments.
        output: the structure that the forward returned, with nodes for tensors.
        called: paths of the modules that ran, those within leaves, too.
    """

    model: nn.Module
    nodes: list[Node] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)
    output: Any = None
    called: set[str] = field(default_factory=set)

    def noise(self) -> set[Node]:
        """What is made of random numbers, and of no input."""
        found: set[Node] = set()
        for node in self.nodes:
            if node.data and node.op in ("call", "module") and all(n in found for n in node.inputs if n.data):
                found.add(node)
        return found


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
        self.meta = next((t.is_meta for t in (*model.parameters(), *model.buffers())), False)
        self.known: dict[int, tuple[Tensor, Node]] = {}
        self.aliases: dict[int, list[Tensor]] = {}
        self.paths = {id(t): path for path, t in (*model.named_buffers(), *model.named_parameters())}
        self.kept = {id(t): t for t in (*model.parameters(), *model.buffers())}
        held = (value for module in model.modules() for value in vars(module).values())
        self.attributes = {id(value): value for value in held if isinstance(value, Tensor)}
        self.own: dict[int, list[Tensor]] = {}
        for tensor in self.kept.values():
            self.own.setdefault(_storage(tensor), []).append(tensor)
        self.twins: dict[int, tuple[Tensor, Tensor]] = {}
        self.overwritten: set[int] = set()  # real tensors whose twins were written to: their own values are old
        self.parts: dict[int, tuple[Tensor, Any]] = {}  # what indexing gave: of which tensor, and where
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
        with _untouched(gradients), contextlib.ExitStack() as stack:
            for path, module in self.record.model.named_modules():
                self._watch(stack, path, module)
            for function in self._functions():
                self._wrap(stack, function)
            stack.callback(_active.pop)
            _active.append(self)
            stack.enter_context(self)
            output = self.record.model(*args, **kwargs)
        self.record.output = self._nodes_for(output)
        unused = set(_unused(self.record))
        self.record.nodes = [node for node in self.record.nodes if node not in unused]
        for node in self.record.nodes:
            node.value = pytree.tree_map_only(Tensor, lambda t: t if t.is_meta else _on_meta(t), node.value)
        return self.record

    def _take_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str]) -> None:
        for i, value in enumerate((*args, *kwargs.values())):
            name = (names[i] if i < len(names) else f"input_{i}") if i < len(args) else list(kwargs)[i - len(args)]
            tensors = _tensors(value)
            for k, tensor in enumerate(tensors):
                node = Node("input", name, value=tensor, data=True)
                node.name = self._name(name if len(tensors) == 1 else f"{name}_{k}")
                self.record.nodes.append(node)
                self.record.inputs.append(node)
                self._bind(tensor, node)
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
                    self.pending = path, tuple(nodes_in((self._nodes_for(args), self._nodes_for(kwargs))))

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
            return func(*self._alike(args), **self._alike(kwargs))
        given = _tensors((args, kwargs))
        self.pending = func, tuple(self.known[id(t)][1] for t in given if id(t) in self.known)
        alike, named = self._alike(args), self._alike(kwargs)
        run = _tensors((alike, named))
        versions = [t._version for t in run]
        result = func(*alike, **named)
        changed = [(t, r) for t, r, version in zip(given, run, versions, strict=True) if r._version != version]
        if not changed and not _tensors(result):
            return result
        target, args = _key(func, args, self.table)
        kwargs = {_NUMPY_NAMES.get(name, name): value for name, value in kwargs.items()}
        if target == "" or (target is getattr and args[1] in ("grad", "shape")):
            return result
        written = bool(changed) and result is None and changed[0][0] is (args[0] if args else None)
        self.note("call", target, args, kwargs, changed[0][0] if written else result)
        if target is operator.getitem and isinstance(result, Tensor) and _storage(result) == _storage(given[0]):
            self.parts[id(result)] = given[0], args[1]
        returned = {id(t) for t in _tensors(result)}
        noted = {_storage(t) for t in ([changed[0][0]] if written else _tensors(result))}
        for tensor, twin in changed[written:]:
            if id(twin) in returned and twin is not tensor:  # what was returned stands for it
                self._bind(tensor, self.known[id(twin)][1])
            elif id(tensor) not in returned and _storage(tensor) not in noted:
                self._bind(tensor, self._changed(target, tensor))
        for tensor, twin in changed:
            if twin is not tensor:
                self.overwritten.add(id(tensor))
            if id(tensor) in returned or tensor is changed[0][0] or _storage(tensor) not in noted:
                self._spread(tensor)
        return result

    def _changed(self, target: Any, tensor: Tensor) -> Node:
        """What an operation made of a tensor that it changed and did not return."""
        return self._add("call", f"in-place change by {describe(target)}", (self._node_of(tensor),), {}, tensor)

    def _alike(self, value: Any) -> Any:
        """Arguments for a run on the meta device: what is real among tensors that aren't becomes a meta tensor."""
        if not self.meta:
            return value
        tensors = _tensors(value)
        valueless = any(t.is_meta or id(t) in self.overwritten for t in tensors)
        if not valueless or all(t.is_meta for t in tensors):
            return value
        return pytree.tree_map_only(Tensor, lambda t: t if t.is_meta else self._twin(t), value)

    def _twin(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.twins:
            self.twins[id(tensor)] = tensor, _on_meta(tensor)
            self._bind(self.twins[id(tensor)][1], self._node_of(tensor))
        return self.twins[id(tensor)][1]

    def note(self, op: Any, target: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Add an operation, and know the tensors that it returned."""
        if not _tensors(result):
            return
        with torch._C.DisableTorchFunction():
            name = target if isinstance(target, str) else getattr(target, "__name__", "")
            if op == "call" and _is_random(name):
                args, kwargs = args[name in _RANDOM_OVER :], {**kwargs, "dtype": result.dtype, "device": HERE}
            if target is operator.setitem and _is_mask(*args):
                target = "masked_fill_"
            if target == "copy_":
                target, args, kwargs = "expand", (args[1], tuple(result.shape)), {}
            if name in _ALIKE and len(args) == 2 and isinstance(args[1], Tensor) and not self._node_of(args[0]).data:
                target = _ALIKE[name]
                args = args[0], result.dtype if target == "to" else tuple(result.shape)
            node = self._add(op, target, self._nodes_for(args), self._nodes_for(kwargs), result)
            self._bind_all(result, node)

    def _bind_all(self, value: Any, node: Node) -> None:
        if isinstance(value, Tensor):
            self._bind(value, node)
        elif isinstance(value, tuple | list):
            for i, entry in enumerate(value):
                if _tensors(entry):
                    self._bind_all(entry, self._add("call", operator.getitem, (node, i), {}, entry))
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                if _tensors(entry):
                    self._bind_all(entry, self._add("call", operator.getitem, (node, key), {}, entry))

    def _add(self, op: Any, target: Any, args: Any, kwargs: Any, value: Any) -> Node:
        if target is operator.setitem and not any(n.data for n in nodes_in(args)):
            target = written
        node = Node(op, target, args, kwargs, _sizes(value), scope=self.scopes[-1], source=_source())
        node.detached = self.gradients and not torch.is_grad_enabled()
        name = target if isinstance(target, str) else getattr(target, "__name__", "call")
        node.data = any(n.data for n in node.inputs) or op == "unseen" or _is_random(name)
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

    def _bind(self, tensor: Tensor, node: Node) -> None:
        if id(tensor) not in self.known:
            self.aliases.setdefault(_storage(tensor), []).append(tensor)
        self.known[id(tensor)] = tensor, node

    def _spread(self, changed: Tensor) -> None:
        """Other tensors that share memory with one that was changed are changed with it: first those it is a part of."""
        done, top = {id(changed)}, changed
        while id(top) in self.parts:
            whole, index = self.parts[id(top)]
            before, source = self.known[id(whole)][1], self.known[id(top)][1]
            target: Any = operator.setitem
            args: Any = before, self._nodes_for(index), source
            if _whole(whole, top):
                target, args = "reshape", (source, tuple(whole.shape))
            self.known[id(whole)] = whole, self._add("call", target, args, {}, whole)
            done.add(id(whole))
            top = whole
        for other in self.aliases.get(_storage(changed), []):
            if id(other) not in done:
                self.known[id(other)] = other, self._reread(other, changed, top, done)
                done.add(id(other))
        if id(changed) in self.overwritten:
            self.overwritten |= done

    def _reread(self, other: Tensor, changed: Tensor, top: Tensor, done: set[int]) -> Node:
        """What a tensor holds after one that it shares memory with was changed, and the whole of that."""
        for tensor in (top, changed):
            if _whole(other, tensor):
                return self._add("call", "reshape", (self.known[id(tensor)][1], tuple(other.shape)), {}, other)
        if id(other) in self.parts and id(self.parts[id(other)][0]) in done:
            whole, index = self.parts[id(other)]
            return self._add("call", operator.getitem, (self.known[id(whole)][1], self._nodes_for(index)), {}, other)
        nodes = self.known[id(other)][1], self.known[id(changed)][1]
        return self._add("call", "in-place change of a view", nodes, {}, other)

    def _nodes_for(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, tuple):
            mapped = [self._nodes_for(v) for v in value]
            return type(value)(*mapped) if hasattr(value, "_fields") else tuple(mapped)
        if isinstance(value, list):
            return [self._nodes_for(v) for v in value]
        if isinstance(value, Mapping):
            return {k: self._nodes_for(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._nodes_for(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, torch.device) and (value.type == "meta" or not self.meta):
            return HERE
        return value

    def _node_of(self, tensor: Tensor) -> Node:
        found = self.known.get(id(tensor))
        if found is not None:
            return found[1]
        path = self.paths.get(id(tensor)) or self._path_of_alias(tensor)
        if path is not None:
            node = Node("tensor", path, value=tensor)
        elif (self.meta and not tensor.is_meta) or id(tensor) in self.attributes:
            node = Node("constant", tensor.detach(), value=_on_meta(tensor))
        else:
            return self._unseen(tensor)
        self.record.nodes.append(node)
        self._bind(tensor, node)
        return node

    def _path_of_alias(self, tensor: Tensor) -> str | None:
        """The parameter or buffer whose memory a tensor is, all of it: what `torch.autograd.Variable` makes of one."""
        for own in self.own.get(_storage(tensor), ()):
            if own.shape == tensor.shape and _whole(own, tensor):
                return self.paths[id(own)]
        return None

    def _unseen(self, tensor: Tensor) -> Node:
        node = self._add(
            "unseen", "an operation that torch doesn't show (a custom autograd function, a scripted one)", (), {}, tensor
        )
        self._bind(tensor, node)
        return node


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


_active: list[Recorder] = []


def unrecorded(function: Function) -> Function:
    """A function whose operations are no part of a network: no recorder sees them."""

    @functools.wraps(function)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        if not _active:
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return cast(Function, quiet)


def _key(func: Any, args: tuple[Any, ...], table: RuleTable) -> tuple[Any, tuple[Any, ...]]:
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


def _is_mask(x: Any, index: Any, value: Any) -> bool:
    """Whether ``x[index] = value`` puts a number wherever the index, of the same shape, is true."""
    return (
        isinstance(index, Tensor) and index.dtype == torch.bool and index.shape == x.shape and not isinstance(value, Tensor)
    )


def _is_random(name: str) -> bool:
    return name in _RANDOM or name in _RANDOM_OVER


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a structure."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _tensors(v)]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, slice):
        return _tensors((value.start, value.stop, value.step))
    if pytree.tree_is_leaf(value):
        return []
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _sizes(value: Any) -> Any:
    """A value's sizes and kinds as they are now: a network may change those of its tensors in place."""
    with torch._C.DisableTorchFunction():
        return pytree.tree_map_only(Tensor, lambda t: t.detach() if t.is_meta else _on_meta(t), value)


def _on_meta(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return torch.empty_like(tensor, device="meta")


def _storage(tensor: Tensor) -> int:
    try:
        with torch._C.DisableTorchFunction():
            return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return id(tensor)


def _whole(other: Tensor, changed: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order."""
    with torch._C.DisableTorchFunction():
        if (other.numel(), other.dtype, other.storage_offset()) != (
            changed.numel(),
            changed.dtype,
            changed.storage_offset(),
        ):
            return False
        alike = other.shape == changed.shape and other.stride() == changed.stride()
        return alike or (other.is_contiguous() and changed.is_contiguous())


def _unused(record: Record) -> Iterator[Node]:
    """Entries of several results, memory, and what was written, that nothing reads, and that aren't returned."""
    kept = {id(node) for node in _output_nodes(record.output)}
    for node in reversed(record.nodes):
        if node.target in (*_MEMORY, *_WRITES) and not node.users and id(node) not in kept:
            for source in node.inputs:
                source.users.pop(node, None)
            yield node
        elif node.target is operator.getitem and node.args[0].op != "input" and not node.users and id(node) not in kept:
            container = node.args[0]
            if not isinstance(container.value, Tensor):
                container.users.pop(node, None)
                yield node


def _output_nodes(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [n for v in entries for n in _output_nodes(v)]


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


@contextlib.contextmanager
def _untouched(gradients: bool) -> Iterator[None]:
    """No warnings, checkpoints that only run what is in them, and random states as they were."""
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    own = CheckpointFunction.__dict__.get("apply")
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CheckpointFunction.apply = staticmethod(lambda function, _, *args: function(*args))
        try:
            yield
        finally:
            if own is None:
                del CheckpointFunction.apply
            else:
                CheckpointFunction.apply = own
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(drawn)
