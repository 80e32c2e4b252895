"""A moment lane as a program: operations on parameters, written out as Python in the order in which they are needed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.conversion.segmentation import SegmentGroup, segment_groups
from normprop.errors import NormPropError
from normprop.graph.node import HERE, Function, Node, map_nodes
from normprop.rules.composed import Program as Composition
from normprop.rules.composed import composed
from normprop.rules.elementwise import module_activation, module_slope, named_activation, named_slope, natively_rectified
from normprop.sites.site import Site, site_moments, site_scales

# Sites are computed together until their weights hold this many numbers. From there on a site costs more than its calls,
# and the gradients of large weights had better not wait for each other.
_TOGETHER = 1 << 18
# Weights of a compiled segment, whose sites cost less.
_SEGMENT = 1 << 20


@dataclass(frozen=True)
class Program:
    """What gives some lane nodes their values.

    Attributes:
        code: the Python function ``lane(root)``, which returns the values as a tuple.
        globals: what the code names.
        function: the function itself.
    """

    code: str
    globals: dict[str, Any]
    function: Callable[[nn.Module], tuple[Any, ...]]

    @classmethod
    def of(cls, code: str, names: Mapping[str, Any]) -> Program:
        """The program of some code, functions among what it names as such or by the names that import them."""
        loaded = {name: value.load() if isinstance(value, Function) else value for name, value in names.items()}
        space = dict(loaded)
        exec(compile(code, "<moment lane>", "exec"), space)
        return cls(code, loaded, space["lane"])

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickle keeps: code, and what it names."""
        names = {name: Function.of(value) if callable(value) else value for name, value in self.globals.items()}
        return Program.of, (self.code, names)


def written(outputs: Sequence[Node], root: nn.Module, *, compiled: bool = False) -> Program:
    """The program for some nodes: every operation as late as its first use, and equal ones done in one call.

    Args:
        outputs: what it is to return, in order.
        root: a network that holds the modules which the nodes name.
        compiled: with what compiled segments can hold in these.
    """
    nodes = _upstream(outputs)
    segments, level = segment_groups(nodes, outputs, root, _SEGMENT) if compiled else ([], {})
    held = {node for group in segments for node in group.held}
    left = [node for node in nodes if node not in held]
    groups: list[_Group | SegmentGroup] = [
        *segments,
        *_site_groups(left, root),
        *_moment_groups(left),
        *_activation_groups(nodes, root, held, level),
    ]
    return _Writer(groups).run(outputs)


def raw(module: nn.Module, name: str) -> Any:
    """A parameter of a module, also while an effective weight stands before it."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def site_at(parent: nn.Module, name: str, path: str) -> nn.Module:
    """The site of a path.

    Raises:
        NormPropError: something else is there now.
    """
    found = parent._modules.get(name)
    if isinstance(found, Site) and (found.path == path or path.endswith(f".{found.path}")):  # of a part with its own lane
        return found
    raise _replaced(path, Site, found)


def module_at(parent: nn.Module, name: str, path: str, kind: type[nn.Module]) -> nn.Module:
    """The module of a path, which runs the forward that was recorded.

    Raises:
        NormPropError: something else is there now.
    """
    found = parent._modules.get(name)
    if found is None or (type(found) is not kind and type(found).forward is not kind.forward):
        raise _replaced(path, kind, found)
    return found


def _replaced(path: str, kind: type, found: nn.Module | None) -> NormPropError:
    now = "nothing" if found is None else f"what was {found.path}" if isinstance(found, Site) else type(found).__name__
    return NormPropError(
        f"{path} was a {kind.__name__} that moments flow through when the network was converted; now it is {now}.\n"
        "Convert again, from the network with that change in it."
    )


def module_activations(modules: Sequence[nn.Module], *xs: Moments) -> list[Moments]:
    """`module_activation` of several tensors, each by its own module; these were equal when they were recorded."""
    first = modules[0]
    if not _equal_settings(modules):
        return [module_activation(m, x) for m, x in zip(modules, xs, strict=True)]
    slope = module_slope(first)
    natively = None if slope is None else natively_rectified(xs, slope)
    return natively or _apart(module_activation(first, _together(xs)), xs)


def _equal_settings(modules: Sequence[nn.Module]) -> bool:
    if type(modules[0]) is nn.ReLU:  # the one that has none, and small networks do little else
        return True
    first = _settings(modules[0])
    return all(_settings(m) == first for m in modules[1:])


def _settings(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in ("training", "inplace")}


def named_activations(
    name: str, parameters: tuple[str, ...], xs: Sequence[Moments], *args: Any, **kwargs: Any
) -> list[Moments]:
    """`named_activation` of several tensors."""
    slope = named_slope(name, parameters, xs[0], *args, **kwargs)
    natively = None if slope is None else natively_rectified(xs, slope)
    return natively or _apart(named_activation(name, parameters, _together(xs), *args, **kwargs), xs)


def composed_activations(
    xs: Sequence[Moments], program: Composition, bends: tuple[float, ...], jumps: tuple[float, ...]
) -> list[Moments]:
    """`composed` of several tensors, without operands."""
    return _apart(composed(_together(xs), program, bends, jumps), xs)


def _together(xs: Sequence[Moments]) -> Moments:
    dim = _common(xs)
    if dim is None:
        xs = [x.expanded(torch.broadcast_shapes(x.mean.shape, x.var.shape)) for x in xs]
        return Moments(torch.cat([x.mean.reshape(-1) for x in xs]), torch.cat([x.var.reshape(-1) for x in xs]))
    return Moments(torch.cat([x.mean for x in xs], dim), torch.cat([x.var for x in xs], dim))


def _apart(whole: Moments, xs: Sequence[Moments]) -> list[Moments]:
    dim = _common(xs)
    if dim is not None:
        sizes = [x.mean.shape[dim] for x in xs]
        return [Moments(*pair) for pair in zip(whole.mean.split(sizes, dim), whole.var.split(sizes, dim), strict=True)]
    shapes = [torch.broadcast_shapes(x.mean.shape, x.var.shape) for x in xs]
    sizes = [shape.numel() for shape in shapes]
    parts = zip(whole.mean.split(sizes), whole.var.split(sizes), shapes, strict=True)
    return [Moments(mean.reshape(shape), var.reshape(shape)) for mean, var, shape in parts]


def _common(xs: Sequence[Moments]) -> int | None:
    """The one dimension along which all of them vary, if there is such a dimension: they are joined and split along it."""
    rank = xs[0].mean.dim()
    varying = {d for x in xs for t in (x.mean, x.var) for d, size in enumerate(t.shape) if size > 1}
    alike = all(x.mean.shape == x.var.shape and x.mean.dim() == rank for x in xs)
    return varying.pop() if alike and len(varying) == 1 else None


class _Group:
    """Nodes that one call replaces.

    Args:
        nodes: calls of one function.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes

    def reads(self) -> list[Node]:
        """The nodes that the one call reads."""
        return [a for node in self.nodes for a in node.inputs]

    def call(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The one call: it returns an entry per node."""
        first = self.nodes[0]
        args = [node.args for node in self.nodes]
        if first.target in (site_scales, site_moments):
            return first.target, tuple(a[0] for a in args), {}
        if first.target is module_activation:
            return module_activations, (tuple(a[0] for a in args), *(a[1] for a in args)), {}
        if first.target is composed:
            return composed_activations, (tuple(a[0] for a in args), *args[0][1:]), {}
        name, parameters, _, *rest = args[0]
        return named_activations, (name, parameters, tuple(a[2] for a in args), *rest), first.kwargs


def _upstream(outputs: Sequence[Node]) -> list[Node]:
    """The outputs and all that they need, each behind what it reads."""
    found: dict[Node, None] = {}
    stack = list(reversed(outputs))
    while stack:
        node = stack[-1]
        missing = [a for a in node.inputs if a not in found]
        if node in found or not missing:
            stack.pop()
            found[node] = None
        else:
            stack.extend(reversed(missing))
    return list(found)


def _site_groups(nodes: Sequence[Node], root: nn.Module) -> Iterator[_Group]:
    """Consecutive sites."""
    together: list[Node] = []
    size = 0
    for node in nodes:
        if node.target is not site_scales:
            continue
        weight = node.args[0][0]
        together.append(node)
        size += 0 if weight is None else operator.attrgetter(weight.target)(root).numel()
        if size >= _TOGETHER:
            yield _Group(together)
            together, size = [], 0
    if together:
        yield _Group(together)


def _moment_groups(nodes: Sequence[Node]) -> Iterator[_Group]:
    """What leaves sites: parameters alone decide it, so all of it can be known at once."""
    together = [node for node in nodes if node.target is site_moments]
    if together:
        yield _Group(together)


def _activation_groups(
    nodes: Sequence[Node], root: nn.Module, held: Collection[Node], level: Mapping[Node, int]
) -> Iterator[_Group]:
    """Equal activations behind equally many others and segments, so that none waits for another; not those that are held."""
    depth: dict[Node, int] = {}
    groups: dict[Hashable, list[Node]] = {}
    for node in nodes:
        key = None if node in held else _activation_key(node, root)
        depth[node] = max((depth[a] for a in node.inputs), default=0) + (key is not None)
        if key is not None:
            groups.setdefault((level.get(node, 0), depth[node], key), []).append(node)
    yield from (_Group(together) for together in groups.values() if len(together) > 1)


def _activation_key(node: Node, root: nn.Module) -> Hashable:
    """Equal for calls of the same function with the same parameters; None for anything else."""
    if node.target is module_activation:
        module = root.get_submodule(node.args[0].target)
        if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
            return None
        return type(module), repr(sorted(_settings(module).items()))
    if node.target is named_activation and len(node.inputs) == 1:
        return "", repr((*node.args[:2], *node.args[3:], sorted(node.kwargs.items())))
    if node.target is composed and len(node.inputs) == 1:
        return "composed", repr(node.args[1:])
    return None


class _Literal:
    """Code among arguments."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __repr__(self) -> str:
        return self.code


class _Writer:
    """Writes nodes as lines of Python.

    Args:
        groups: what to compute together.
    """

    def __init__(self, groups: Sequence[_Group | SegmentGroup]) -> None:
        self.group = {node: group for group in groups for node in group.nodes}
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}
        self.paths: dict[str, str] = {"": "root"}
        self.checked: dict[str, str] = {}
        self.tensors: dict[str, str] = {}
        self.globals: dict[str, Any] = {"raw": raw, "attribute": operator.attrgetter}
        self.known: dict[int, str] = {}
        self.written: set[_Group] = set()

    def run(self, outputs: Sequence[Node]) -> Program:
        """The program that returns the values of some nodes."""
        for node in outputs:
            self._write(node)
        returned = ", ".join(self.names[node] for node in outputs)
        body = [*self.lines, f"return ({returned},)" if outputs else "return ()"]
        code = "\n    ".join(["def lane(root):", *body]) + "\n"
        return Program.of(code, self.globals)

    def _write(self, node: Node) -> None:
        """Write a node behind everything it reads; not by recursion, for lanes may be deep."""
        stack = [node]
        while stack:
            current = stack[-1]
            group = self.group.get(current)
            if current in self.names:
                stack.pop()
                continue
            reads = group.reads() if group else current.inputs
            missing = [a for a in reads if a not in self.names]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            if group is None:
                self.names[current] = self._single(current)
            else:
                call = self._assign(self._code(*group.call()))
                for i, member in enumerate(group.nodes):
                    self.names[member] = f"{call}[{i}]"

    def _single(self, node: Node) -> str:
        if node.op == "module":
            return self._found(node.target, node.args[0])
        if node.op == "tensor":
            return self._tensor(node.target, node.args[0])
        if node.op == "constant":
            return self._assign(f"{self._name(node.target)}.to({self._device()})")
        if node.target in (site_scales, site_moments):
            return f"{self._assign(self._code(node.target, node.args, {}))}[0]"
        return self._assign(self._code(node.target, node.args, node.kwargs))

    def _assign(self, code: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {code}")
        return name

    def _found(self, path: str, kind: type[nn.Module]) -> str:
        """The variable of a module that is looked at whether it is what it was."""
        if not path:
            return "root"
        if path not in self.checked:
            parent, _, name = path.rpartition(".")
            if kind is Site:
                code = f"{self._name(site_at, 'site_at')}({self._module(parent)}, {name!r}, {path!r})"
            else:
                code = f"{self._name(module_at, 'module_at')}({self._module(parent)}, {name!r}, {path!r}, "
                code += f"{self._name(kind, kind.__name__)})"
            self.checked[path] = self._assign(code)
        return self.checked[path]

    def _module(self, path: str) -> str:
        """A module's variable; every module on the way there has one of its own."""
        if path in self.checked:
            return self.checked[path]
        if path not in self.paths:
            parent, _, name = path.rpartition(".")
            self.paths[path] = self._assign(f"{self._module(parent)}._modules[{name!r}]")
        return self.paths[path]

    def _tensor(self, path: str, kind: type[nn.Module]) -> str:
        if path not in self.tensors:
            parent, _, name = path.rpartition(".")
            holder = self._found(parent, kind) if kind is Site else self._module(parent)
            self.tensors[path] = self._assign(f"raw({holder}, {name!r})")
        return self.tensors[path]

    def _device(self) -> str:
        return "next(root.parameters()).device"

    def _code(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if isinstance(target, str):
            function, args = f"{self._argument(args[0])}.{target}", args[1:]
        else:
            function = self._name(target, getattr(target, "__name__", "call"))
        given = [self._argument(a) for a in args] + [f"{k}={self._argument(v)}" for k, v in kwargs.items()]
        return f"{function}({', '.join(given)})"

    def _argument(self, value: Any) -> str:
        literal = map_nodes(value, lambda node: _Literal(self.names[node]))
        if _plain(literal):
            return repr(literal)
        if isinstance(literal, tuple) and not hasattr(literal, "_fields"):
            return f"({', '.join(self._argument(v) for v in literal)}{',' * (len(literal) == 1)})"
        if isinstance(literal, list):
            return f"[{', '.join(self._argument(v) for v in literal)}]"
        if isinstance(literal, dict):
            return f"{{{', '.join(f'{k!r}: {self._argument(v)}' for k, v in literal.items())}}}"
        return self._device() if value is HERE else self._name(value)

    def _name(self, value: Any, wanted: str = "") -> str:
        """A global of the program."""
        if id(value) not in self.known:
            name = wanted if wanted.isidentifier() and wanted not in self.globals else f"{wanted or 'c'}_{len(self.known)}"
            name = name if name.isidentifier() else f"c_{len(self.known)}"
            self.known[id(value)], self.globals[name] = name, value
        return self.known[id(value)]


def _plain(value: Any) -> bool:
    """Whether Python reads back what it prints of a value."""
    if isinstance(value, tuple | list):
        return not hasattr(value, "_fields") and all(_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_plain(k) and _plain(v) for k, v in value.items())
    if isinstance(value, slice):
        return all(_plain(v) for v in (value.start, value.stop, value.step))
    if type(value) is float:
        return value == value and abs(value) != float("inf")
    if value is Ellipsis:
        return False
    return value is None or type(value) in (bool, int, str, _Literal)


def constant(value: Any) -> Node:
    """A node of a tensor that stays as it is."""
    return Node("constant", value.detach() if isinstance(value, Tensor) else value)
