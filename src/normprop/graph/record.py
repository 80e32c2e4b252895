"""The operations of one forward of a network, in order."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normprop.graph.node import Node

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

    def drop_unused(self) -> None:
        """Leave out entries of several results, memory, and what was written to it, that nothing reads or returns."""
        unused = set(self._unused())
        self.nodes = [node for node in self.nodes if node not in unused]

    def _unused(self) -> Iterator[Node]:
        kept = {id(node) for node in _output_nodes(self.output)}
        for node in reversed(self.nodes):
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
