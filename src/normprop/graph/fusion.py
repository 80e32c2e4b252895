"""Elementwise operations that compose to one function of one tensor: found in a traced graph, taken together.

``x * torch.sigmoid(x)`` is two operations, and a product of factors that are anything but independent. Here it becomes
one function of x, whose moments are exact where those of factor and product by their own rules are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from normprop.errors import NormPropError
from normprop.graph.elementwise_operation import Fetch, Operation, OperationReader
from normprop.graph.node import Node
from normprop.graph.record import Record
from normprop.rules import elementwise
from normprop.rules.composed import Program, Step, composed, find_bends
from normprop.rules.table import Rule

_LIMIT = 64  # steps of one program

_MOVING = "the function is taken to bend where it does with its present parameters"
_AFFINE = frozenset(["same", "add", "sub", "rsub", "neg", "mul", "div", "addcmul", "lerp", "zeros", "ones", "full_like"])


@dataclass(frozen=True)
class Fused:
    """A node as a function of an earlier one.

    Attributes:
        source: the node whose values the function takes.
        program: the function, see `normprop.rules.composed`.
        bends: where it bends.
        jumps: where it jumps.
        operands: nodes with its parameters and modules.
    """

    source: Node
    program: Program
    bends: tuple[float, ...]
    jumps: tuple[float, ...]
    operands: tuple[Node, ...]

    def rule(self) -> Rule:
        """The rule that stands for it."""
        return Rule(composed, "approximate", _MOVING) if self.movable else Rule(composed)

    @property
    def movable(self) -> bool:
        """Whether its parameters may move its bends, as slopes per channel, which meet at 0, do not."""
        steps = (step for step in self.program if step[0] not in ("module", "prelu"))
        return any(
            str(argument).startswith("@") for _, args, kwargs in steps for argument in (*args, *dict(kwargs).values())
        )


class Fusion:
    """Finds the nodes of a graph that are functions of one earlier node, and composes them.

    A node stays with its own rule where that is exact: an affine map of a Gaussian, one activation of it, an affine map of
    either. Everything else that can be written as a function of one tensor is taken as that function, unless it is not
    finite everywhere, as a logarithm; what comes of that further on may be.

    Args:
        record: of the network. Nodes that fetch parameters are made beside it where a function needs them.
        known: gives the present value of a node that is made of parameters alone.
        model: the network with values.
        rules: node → rule, where there is one.
    """

    def __init__(self, record: Record, known: Callable[[Node], Any], model: nn.Module, rules: Mapping[Node, Rule]) -> None:
        self.record = record
        self.known = known
        self.rules = rules
        self.noise = record.noise()
        self.reader = OperationReader(model, rules)
        self.operations: dict[Node, Operation] = {}
        self.roots: dict[Node, Node] = {}
        self.affine: set[Node] = set()
        self.fetched: dict[Fetch, Node] = {}

    def run(self) -> dict[Node, Fused]:
        """Every node to be taken as a function, with the function."""
        fused: dict[Node, Fused] = {}
        for node in self.record.nodes:
            if not node.data:
                continue
            found = self._visit(node)
            if found is not None:
                fused[node] = found
        return fused

    def _visit(self, node: Node) -> Fused | None:
        found = None if node in self.noise else self.reader.read(node)  # its rules know better than that it is Gaussian
        sources = [] if found is None else [n for n in found.nodes() if n.data]
        roots = {self.roots[n] for n in sources}
        if found is None or len(roots) != 1 or self._shape(node) != self._shape(next(iter(roots))):
            self.roots[node] = node
            self.affine.add(node)
            return None
        self.operations[node] = found
        (self.roots[node],) = roots
        on_affine = all(n in self.affine for n in sources)
        affine = found.name in _AFFINE and not self._multiplies(found)
        if affine and on_affine:
            self.affine.add(node)
        if node in self.rules and self._is_exact(node, found, sources, affine, on_affine):
            return None
        return self._fuse(node)

    def _shape(self, node: Node) -> Any:
        return getattr(node.value, "shape", None)

    def _multiplies(self, found: Operation) -> bool:
        """Whether values of the tensor are multiplied with each other, or divide."""
        data = lambda a: isinstance(a, Node) and a.data
        where: dict[str, Callable[[], bool]] = {
            "mul": lambda: all(map(data, found.args[:2])),
            "div": lambda: any(map(data, found.args[1:])),
            "addcmul": lambda: all(map(data, found.args[1:3])),
            "lerp": lambda: any(map(data, (*found.args[2:], *dict(found.kwargs).values()))),
        }
        return found.name in where and where[found.name]()

    def _is_exact(self, node: Node, found: Operation, sources: list[Node], affine: bool, on_affine: bool) -> bool:
        """Whether the node's own rule loses nothing."""
        if len(sources) == 1:
            own = self.rules[node].function in (elementwise.named_activation, elementwise.module_activation)
            closed = found.name in ("maximum", "minimum") or (found.name == "power" and found.args[1:] in ((2,), (3,)))
            return affine or (on_affine and not found.searched and (own or closed))
        same = len(set(sources)) == 1
        return same and on_affine and found.name in ("mul", "add", "sub")

    def _fetch(self, wanted: Fetch) -> Node:
        """A node that gets an operand."""
        if wanted not in self.fetched:
            fetched = Node("tensor", wanted.path) if isinstance(wanted.path, str) else wanted.path
            if wanted.size is not None and self.known(fetched).numel() > 1:
                fetched = Node("call", "reshape", (fetched, wanted.size))
            self.fetched[wanted] = fetched
        return self.fetched[wanted]

    def _fuse(self, node: Node) -> Fused | None:
        source = self._start(node)
        region = self._between(source, node)
        if len(region) > _LIMIT:
            return None
        numbers = {source: 0} | {n: i + 1 for i, n in enumerate(region)}
        operands: list[Node] = []

        def written(argument: Any) -> Any:
            if isinstance(argument, Fetch):
                argument = self._fetch(argument)
            if not isinstance(argument, Node):
                return argument
            if argument in numbers:
                return f"%{numbers[argument]}"
            if argument not in operands:
                operands.append(argument)
            return f"@{operands.index(argument)}"

        program: list[Step] = []
        for n in region:
            step = self.operations[n]
            kwargs = tuple((key, written(value)) for key, value in step.kwargs)
            program.append((step.name, tuple(written(a) for a in step.args), kwargs))
        found = self._bends(node, tuple(program), operands)
        return None if found is None else Fused(source, tuple(program), *found, tuple(operands))

    def _start(self, node: Node) -> Node:
        """The last affine function of the root through which all of the node's values go."""
        upstream = self._between(self.roots[node], node)[:-1]
        for candidate in reversed(upstream):
            if candidate in self.affine and self.roots[node] not in self._leaves(node, candidate):
                return candidate
        return self.roots[node]

    def _between(self, source: Node, node: Node) -> list[Node]:
        """The nodes from behind the source to the node, in the order of the graph."""
        found: set[Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current is not source and current not in found:
                found.add(current)
                stack.extend(n for n in self.operations[current].nodes() if n.data)
        return [n for n in self.operations if n in found]

    def _leaves(self, node: Node, stop: Node) -> set[Node]:
        """What a node is made of if the graph ended at another one, and at the root."""
        leaves: set[Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current is stop or current not in self.operations:
                leaves.add(current)
            else:
                stack.extend(n for n in self.operations[current].nodes() if n.data)
        return leaves

    def _bends(
        self, node: Node, program: Program, operands: list[Node]
    ) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Bends and jumps of a function; None if it has no moments, an error if its user said that it has."""
        try:
            return find_bends(program, [self.known(o) for o in operands])
        except NormPropError as error:
            if self.operations[node].searched:
                raise NormPropError(f"{node.target} cannot be integrated as an activation: {error}") from error
            return None
