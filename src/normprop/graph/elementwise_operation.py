"""What a node of a traced graph computes elementwise, in the words of a program."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normprop.activations.activation_moments import canonical
from normprop.errors import NormPropError
from normprop.graph.node import Node
from normprop.rules import arithmetic, combine, elementwise, reduction, select, shape
from normprop.rules.composed import operation
from normprop.rules.table import Rule, describe

# Rules whose operation a program can run, and its name there.
_NAMES: dict[Callable[..., Any], str] = {
    **{getattr(arithmetic, name): name for name in (
        "add", "sub", "rsub", "mul", "div", "neg", "addcmul", "lerp", "power", "sqrt", "rsqrt", "reciprocal", "log", "log1p",
        "maximum", "minimum",
    )},
    shape.same: "same", shape.same_module: "same", select.masked_fill: "masked_fill",
    combine.zeros: "zeros", combine.ones: "ones", combine.full_like: "full_like",
    reduction.max_: "maximum", reduction.min_: "minimum",
}  # fmt: skip


def _spellings(*names: str) -> Iterator[tuple[Any, str]]:
    """An operation as a function of torch, torch.special or operator, and as a method."""
    for name in names:
        for space in (torch, torch.special, operator):
            if callable(found := getattr(space, name, None)):
                yield found, name
        if hasattr(Tensor, name):
            yield name, name


# Operations without a rule of their own that still are functions of one tensor.
_FURTHER: dict[Any, str] = {
    **dict(_spellings("masked_fill", "gt", "ge", "lt", "le", "logical_not", "logical_and", "logical_or")),
    **dict(_spellings("isnan", "isinf", "isfinite")),
    **dict(_spellings("expm1", "atan", "asinh", "exp2", "sinc", "logaddexp", "ndtr")),
    torch.pow: "power", operator.pow: "power", "pow": "power", torch.lerp: "lerp", "lerp": "lerp", torch.where: "where",
    operator.and_: "logical_and", operator.or_: "logical_or", operator.invert: "logical_not",
    torch.arctan: "atan", "arctan": "atan", torch.arcsinh: "asinh", "arcsinh": "asinh",
    torch.greater: "gt", torch.less: "lt", torch.greater_equal: "ge", torch.less_equal: "le", "masked_fill_": "masked_fill",
}  # fmt: skip

_CONSTANT = ("zeros", "ones", "full_like")


@dataclass(frozen=True)
class Fetch:
    """An operand that has no node yet.

    Attributes:
        path: of a module or parameter of the model; or a node whose value needs another shape.
        size: shape to bring it to, None to leave it.
    """

    path: str | Node
    size: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Operation:
    """One elementwise operation: its name in a program and its arguments, nodes among them."""

    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def searched(self) -> bool:
        """Whether nothing is known of it but that its user calls it an activation."""
        return self.name == "module" or self.name.startswith("torch.")

    def nodes(self) -> list[Node]:
        """The nodes among its arguments, once for every mention."""
        return [a for a in (*self.args, *(v for _, v in self.kwargs)) if isinstance(a, Node)]


class OperationReader:
    """Reads nodes as elementwise operations.

    Args:
        model: the network with values.
        rules: node → rule, where there is one.
    """

    def __init__(self, model: nn.Module, rules: Mapping[Node, Rule]) -> None:
        self.model = model
        self.rules = rules

    def read(self, node: Node) -> Operation | None:
        """What a node computes elementwise, if that is what it does."""
        rule = self.rules.get(node)
        if rule is None:
            name = _FURTHER.get(node.target)
            return self._checked(node, name, node.args, dict(node.kwargs)) if name else None
        if rule.function is elementwise.named_activation:
            name, parameters = rule.leading
            args = node.args[: 1 + len(parameters)]
            if name == "prelu":
                args = (*args[:1], self._slopes(node, args[1]))
            return self._checked(node, name, args, dict(node.kwargs))
        if rule.function is elementwise.module_activation:
            return self._module(node) if node.op == "module" else self._function(node)
        name = _NAMES.get(rule.function)
        if name is None or (rule.function in (reduction.max_, reduction.min_) and not self._joins(node)):
            return None
        args = node.args[:1] if name in ("same", "zeros", "ones") else node.args
        kwargs = {} if name == "same" or name in _CONSTANT else dict(node.kwargs)
        return self._checked(node, name, args, kwargs)

    def _joins(self, node: Node) -> bool:
        """Whether torch.max is called with two tensors."""
        return len(node.inputs) == 2 and all(isinstance(n.value, Tensor) for n in node.inputs)

    def _module(self, node: Node) -> Operation | None:
        module = self.model.get_submodule(node.target)
        known = canonical(module)
        if known is None:
            return self._checked(node, "module", (Fetch(str(node.target)), *node.args), {})
        name, parameters = known
        if name == "prelu":
            return self._checked(node, name, (*node.args, self._slopes(node, f"{node.target}.weight")), {})
        return self._checked(node, name, node.args, parameters)

    def _function(self, node: Node) -> Operation:
        """A function of torch that its user calls an activation."""
        name = f"torch.{node.target}" if isinstance(node.target, str) else describe(node.target)
        name = name.removesuffix("_")  # in place it is the same function
        found = self._checked(node, name if name.startswith("torch.") else None, node.args, dict(node.kwargs))
        if found is None:
            raise NormPropError(
                f"{name} cannot be integrated as an activation: only modules and functions of torch can.\n"
                "Call it in a module of its own, and pass the module's class in rules={…}."
            )
        return found

    def _slopes(self, node: Node, weight: Any) -> Any:
        """PReLU's weight, one slope a channel, in the shape that meets the channels along dimension 1."""
        return Fetch(weight, (-1, *(1,) * (node.value.dim() - 2)))

    def _checked(self, node: Node, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        """The operation if a program can run it with these arguments."""
        if name is None or operation(name) is None:
            return None
        given = {k: v for k, v in kwargs.items() if k not in ("inplace", "training", "rounding_mode")}
        if kwargs.get("rounding_mode") is not None:
            return None
        if "input" in given:
            args = (given.pop("input"), *args)
        if not all(self._fits(a, node) for a in (*args, *given.values())):
            return None
        return Operation(name, tuple(args), tuple(given.items()))

    def _fits(self, argument: Any, node: Node) -> bool:
        """Whether a program can hold it: a number, a tensor of the walk, a parameter that differs by channel at most."""
        if not isinstance(argument, Node):
            return argument is None or isinstance(argument, bool | int | float | str | Fetch)
        value = argument.value
        if not isinstance(value, Tensor):
            return False
        rank = node.value.dim() if isinstance(node.value, Tensor) else 0
        return argument.data or (value.dim() <= rank and sum(s != 1 for s in value.shape) <= 1)
