"""Writes operations as lines of Python."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import nn

from normprop.conversion.node_groups import NodeGroup
from normprop.conversion.program_calls import module_at, raw, site_at
from normprop.conversion.segment_writer import SegmentGroup
from normprop.graph.node import HERE, Node, map_nodes
from normprop.sites.site import Site, site_moments, site_scales


class _Literal:
    """Code among arguments."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __repr__(self) -> str:
        return self.code


class ProgramWriter:
    """Writes nodes as lines of Python.

    Args:
        groups: what to compute together.
    """

    def __init__(self, groups: Sequence[NodeGroup | SegmentGroup]) -> None:
        self.group = {node: group for group in groups for node in group.nodes}
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}
        self.paths: dict[str, str] = {"": "root"}
        self.checked: dict[str, str] = {}
        self.tensors: dict[str, str] = {}
        self.globals: dict[str, Any] = {"raw": raw, "attribute": operator.attrgetter}
        self.known: dict[int, str] = {}
        self.written: set[NodeGroup] = set()

    def run(self, outputs: Sequence[Node]) -> tuple[str, dict[str, Any]]:
        """The function ``lane(root)`` that returns the values of some nodes, and what it names."""
        for node in outputs:
            self._write(node)
        returned = ", ".join(self.names[node] for node in outputs)
        body = [*self.lines, f"return ({returned},)" if outputs else "return ()"]
        code = "\n    ".join(["def lane(root):", *body]) + "\n"
        return code, self.globals

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
