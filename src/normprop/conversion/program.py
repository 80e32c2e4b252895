"""A moment lane as a program: operations on parameters, written out as Python in the order in which they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normprop.conversion.node_groups import NodeGroup, activation_groups, moment_groups, site_groups
from normprop.conversion.program_writer import ProgramWriter
from normprop.conversion.segment_writer import SegmentGroup
from normprop.conversion.segmentation import segment_groups
from normprop.graph.node import Function, Node

# How many weights a compiled segment may have; beyond, gradients of large layers had better not wait for each other.
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
    groups: list[NodeGroup | SegmentGroup] = [
        *segments,
        *site_groups(left, root),
        *moment_groups(left),
        *activation_groups(nodes, root, held, level),
    ]
    return Program.of(*ProgramWriter(groups).run(outputs))


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


def constant(value: Any) -> Node:
    """A node of a tensor that stays as it is."""
    return Node("constant", value.detach() if isinstance(value, Tensor) else value)
