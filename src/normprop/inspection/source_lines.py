"""The line of the user's code that a row belongs to."""

from __future__ import annotations

import ast
import linecache

from torch import nn

from normprop.graph.node import Node


class SourceLines:
    """Lines of operations; of a layer within `nn.Sequential` the line on which the layer is written.

    No code of the user runs between the layers of an `nn.Sequential`: a record has the line that called the whole. The
    file of that line is searched for the one call that lists these layers.

    Args:
        model: the recorded network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: dict[str, list[ast.Call]] = {}
        self.written: dict[tuple[str, str], list[int]] = {}

    def of(self, node: Node) -> str:
        """``file:line`` of a node."""
        file, _, _ = node.source.rpartition(":")
        parent, _, name = node.target.rpartition(".") if node.op == "module" else ("", "", "")
        if not file or not name or node.op != "module":
            return node.source
        container = self.model.get_submodule(parent)
        if type(container).forward is not nn.Sequential.forward:
            return node.source
        if (file, parent) not in self.written:
            self.written[file, parent] = self._lines(file, container)
        lines = self.written[file, parent]
        place = list(container._modules).index(name)
        return f"{file}:{lines[place]}" if lines else node.source

    def _lines(self, file: str, container: nn.Module) -> list[int]:
        """The line of each layer where one call in the file lists their classes in order; else nothing."""
        if file not in self.calls:
            self.calls[file] = _container_calls(file)
        classes = [type(child).__name__ for child in container.children()]
        found = [c for c in self.calls[file] if len(c.args) == len(classes) and [_called(a) for a in c.args] == classes]
        return [argument.lineno for argument in found[0].args] if len(found) == 1 else []


def _container_calls(file: str) -> list[ast.Call]:
    """Calls in a file whose arguments are calls."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return []
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.args and all(isinstance(a, ast.Call) for a in n.args)]


def _called(node: ast.expr) -> str:
    """The last name of what a call calls."""
    function = node.func if isinstance(node, ast.Call) else node
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
