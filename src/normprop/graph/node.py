"""Operations as data: what a record of a forward holds, and what a moment lane is made of."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Op = Literal["input", "tensor", "constant", "module", "call", "unseen"]


class Here:
    """Stands for the device that the network is on, in arguments of recorded operations."""

    def __repr__(self) -> str:
        return "device"

    def __reduce__(self) -> str:
        return "HERE"  # there is one, in copies and pickles, too


HERE = Here()


@dataclass(eq=False)
class Node:
    """One operation of a record, or of a program on parameters.

    Attributes:
        op: "input" of the network; "tensor", a parameter or buffer by its path; "constant", a tensor that the forward made
            of nothing or holds; "module", a module kept whole; "call", a function or tensor method; "unseen", whatever made
            a tensor that nobody saw being made.
        target: path of the parameter or module, the function, the name of the method, or the constant itself.
        args: positional arguments, nodes among them; in a lane, of a module the class that it had, of a tensor the class of
            the module that holds it.
        kwargs: keyword arguments, nodes among them.
        value: tensors on the meta device in the structure that the operation returned.
        name: unique within the record, and the same whenever the network takes the same path.
        scope: path of the module whose forward runs the operation.
        source: ``file:line`` of the user's code.
        detached: whether gradients were switched off where it ran.
        data: whether the value depends on the network's input, or is random.
        users: nodes that read this one, in order.
    """

    op: Op
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    value: Any = None
    name: str = ""
    scope: str = ""
    source: str = ""
    detached: bool = False
    data: bool = False
    users: dict[Node, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.inputs:
            node.users[self] = None

    @property
    def inputs(self) -> list[Node]:
        """The nodes among the arguments, each once."""
        return list(dict.fromkeys(nodes_in((self.args, self.kwargs))))

    def __repr__(self) -> str:
        return self.name or f"{self.op} {self.target}"

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps: functions by the names that import them, and nobody who reads the node."""
        target = Function.of(self.target) if callable(self.target) else self.target
        return vars(self) | {"target": target, "users": {}, "value": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if isinstance(self.target, Function):
            self.target = self.target.load()


def map_nodes(value: Any, fn: Callable[[Node], Any]) -> Any:
    """A structure of arguments with every node replaced."""
    if isinstance(value, Node):
        return fn(value)
    if isinstance(value, tuple):
        mapped = [map_nodes(v, fn) for v in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    if isinstance(value, list):
        return [map_nodes(v, fn) for v in value]
    if isinstance(value, dict):
        return {k: map_nodes(v, fn) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(map_nodes(value.start, fn), map_nodes(value.stop, fn), map_nodes(value.step, fn))
    return value


def nodes_in(value: Any) -> Iterator[Node]:
    """The nodes within a structure of arguments, in order."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple | list):
        for v in value:
            yield from nodes_in(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from nodes_in(v)
    elif isinstance(value, slice):
        yield from nodes_in((value.start, value.stop, value.step))


def placed(value: Any, device: torch.device) -> Any:
    """Arguments with the network's device where `HERE` stands."""
    if value is HERE:
        return device
    if isinstance(value, tuple | list):
        return type(value)(placed(v, device) for v in value) if not hasattr(value, "_fields") else value
    return {k: placed(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def run(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function, or the tensor method of a name."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def written(x: Tensor, index: Any, y: Any) -> Tensor:
    """A copy of a tensor with a part of it written over."""
    copy = x.clone()
    copy[index] = y
    return copy


@dataclass(frozen=True)
class Function:
    """A function by the name that imports it: pickle's own names of some of torch's functions do not import."""

    module: str
    name: str

    @classmethod
    def of(cls, function: Any) -> Any:
        """The name of a function that its module holds under it; any other function as it is."""
        module, name = getattr(function, "__module__", None), getattr(function, "__name__", None)
        found = getattr(sys.modules.get(module or ""), name or "", None)
        return cls(module, name) if module and name and found is function else function

    def load(self) -> Any:
        """The function."""
        return getattr(importlib.import_module(self.module), self.name)
