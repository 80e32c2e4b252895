"""A recorded network made ready for the rules: which rule each operation has, and how that rule is called."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.errors import UnsupportedOpError
from normprop.graph.example_inputs import Inputs, Shape
from normprop.graph.fusion import Fused
from normprop.graph.node import Node, map_nodes, nodes_in, placed, run
from normprop.graph.record import Record
from normprop.precision import reference_tensor
from normprop.rules.composed import composed
from normprop.rules.table import Rule, Standing, describe


@dataclass(frozen=True)
class Walk:
    """A recorded network with everything a walk needs.

    Attributes:
        model: the network itself, with values; paths in the record are its own.
        record: what it did.
        example: the inputs of the record, on the meta device.
        rules: rule of every operation on data; of those within composed functions where there is one.
        fused: nodes that are taken as one function of an earlier node, whatever operations lie between.
        missing: operations on data without a rule which are not merely part of a composed function, and why.
    """

    model: nn.Module
    record: Record
    example: Inputs
    rules: Mapping[Node, Rule]
    fused: Mapping[Node, Fused] = field(default_factory=dict)
    missing: Mapping[Node, str] = field(default_factory=dict)

    @property
    def nodes(self) -> list[Node]:
        """All operations, in order."""
        return self.record.nodes

    def inputs(self) -> list[tuple[Shape, torch.dtype]]:
        """Shape of a sample of each input, and its dtype."""
        return [(tuple(node.value.shape[1:]), node.value.dtype) for node in self.record.inputs]

    def shapes(self) -> list[Shape]:
        """Shape of a sample of each input."""
        return [tuple(node.value.shape[1:]) for node in self.record.inputs]

    def module(self, node: Node) -> nn.Module:
        """The module that a node runs."""
        return self.model.get_submodule(node.target)

    def known(self, node: Node) -> Any:
        """The present value of a node that is made of parameters and constants alone."""
        if node.op == "tensor":
            return attrgetter(node.target)(self.model)
        if node.op == "constant":
            return node.target
        args, kwargs = placed(map_nodes((node.args, node.kwargs), self.known), reference_tensor(self.model).device)
        if node.op == "module":
            return self.module(node)(*args, **kwargs)
        return run(node.target, args, kwargs)

    def call(
        self,
        node: Node,
        moments_of: Callable[[Node], Any],
        known: Callable[[Node], Any],
        module: Any = None,
        device: Any = None,
    ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The rule's call for a node: function, arguments, keyword arguments.

        Args:
            node: an operation on data with a rule.
            moments_of: what stands for a node that depends on data (`Moments`, or the lane's node).
            known: what stands for one that is made of parameters (the tensor, or the lane's node).
            module: what stands for the module of a module's node.
            device: what stands for the device that the network is on; by default that device.
        """
        if node in self.fused:
            f = self.fused[node]
            operands = (known(operand) for operand in f.operands)
            return composed, (moments_of(f.source), f.program, f.bends, f.jumps, *operands), {}
        rule = self.rules[node]
        args, kwargs = map_nodes((node.args, node.kwargs), lambda a: moments_of(a) if a.data else known(a))
        if not args and "input" in kwargs:  # torch's name for a first tensor; rules take it by position
            args = (kwargs.pop("input"),)
        if rule.shaped:
            arguments = [t for n in self.data_arguments(node) for t in tensors_in(n.value)]
            kwargs["in_shapes"] = tuple(tuple(t.shape) for t in arguments)
            kwargs["out_shape"] = tuple(node.value.shape) if isinstance(node.value, Tensor) else None
        kwargs = placed(kwargs, reference_tensor(self.model).device if device is None else device)
        first = (module,) if node.op == "module" else ()
        return rule.function, (*rule.leading, *first, *args), kwargs

    def data_arguments(self, node: Node) -> list[Node]:
        """The nodes that a node's moments follow from, in order, once for every mention among its arguments."""
        if node in self.fused:
            return [self.fused[node].source]
        return [n for n in nodes_in((node.args, node.kwargs)) if n.data]

    def standing(self, node: Node) -> tuple[Standing, str]:
        """Standing of a node's rule for its arguments, and the reason."""
        return standing_for(node, self.rules[node])

    def require(self, nodes: Collection[Node] | None = None) -> None:
        """Make sure that nodes have rules, all of them by default.

        Raises:
            UnsupportedOpError: some have none; all of these are named with their place and source line.
        """
        left = [(node, reason) for node, reason in self.missing.items() if nodes is None or node in nodes]
        if left:
            raise _unsupported(self, left)

    def operation(self, node: Node) -> str:
        """What a node does, for people."""
        if node.op == "module":
            return type(self.module(node)).__name__
        return node.target if node.op in ("input", "unseen") else operation_name(node.target)


def operation_name(target: Any) -> str:
    """A recorded function or method, for people."""
    if isinstance(target, str):
        return target if " " in target else f".{target}"
    return describe(target)


def standing_for(node: Node, rule: Rule) -> tuple[Standing, str]:
    """Standing of a rule for a node's arguments, and the reason."""
    if rule.judge is None:
        return rule.standing, rule.reason
    args, kwargs = map_nodes((node.args, node.kwargs), lambda n: Moments if n.data else n)
    if not args and "input" in kwargs:
        args = (kwargs.pop("input"),)
    return rule.standing_for(*args, **kwargs)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an operation's value: itself, or the entries of several."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, tuple | list) else []


def _unsupported(walk: Walk, missing: Sequence[tuple[Node, str]]) -> UnsupportedOpError:
    names = tuple(sorted({walk.operation(node) for node, _ in missing}))
    lines = [f"{len(names)} operation{'s' * (len(names) != 1)} without a moment rule: {', '.join(names)}"]
    for node, reason in missing:
        lines.append(f"  {walk.operation(node)} in {node.scope or 'the model itself'} ({node.source or '?'}): {reason}")
    lines.append("Register a rule with @normprop.rule(…), or pass rules={operation: function} for this call.")
    return UnsupportedOpError("\n".join(lines), names)
