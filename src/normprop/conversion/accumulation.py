"""Gradient accumulation: the moment lane once for several backward passes."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from normprop.conversion.converted import ConvertedModule
from normprop.conversion.lane import lane_graph, lane_nodes, read_by_data
from normprop.errors import NormPropError

_Split = tuple[Callable[..., Any], Callable[..., Any]]
_SPLITS: WeakKeyDictionary[fx.Graph, _Split] = WeakKeyDictionary()


@contextlib.contextmanager
def accumulate(model: nn.Module) -> Iterator[nn.Module]:
    """Run the moment lane once for all forward and backward passes inside the context.

    What the lane computes depends on parameters alone, so micro-batches between two optimiser steps can share it. Their
    gradients with respect to what it computed add up, and go through it once when the context ends: gradients are the same
    as without the context, to rounding, and complete only after it.

    Args:
        model: a converted network, or a module that holds some (a DistributedDataParallel, a Sequential with a
            `Standardize`, …).

    Yields:
        The model.

    Raises:
        NormPropError: nothing in the model is converted, or a parameter was changed inside the context.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> model = normprop.convert(net)
        >>> with normprop.accumulate(model):
        ...     for x in torch.randn(10, 1, 4):
        ...         model(x).square().sum().backward()
        >>> model[0].weight.grad.shape
        torch.Size([8, 4])
    """
    networks = [m for m in model.modules() if isinstance(m, ConvertedModule)]
    if not networks:
        raise NormPropError(f"accumulate found no converted network in {type(model).__name__}.\nConvert it first.")
    shared = [_SharedLane(network) for network in networks]
    for one in shared:
        one.network.__dict__["forward"] = one
    try:
        yield model
    finally:
        for one in shared:
            del one.network.__dict__["forward"]
    for one in shared:
        one.backward()


class _SharedLane:
    """Stands for a network's forward while its lane is shared.

    Args:
        network: the network.
    """

    def __init__(self, network: ConvertedModule) -> None:
        self.network = network
        self.versions = self._versions()
        self.values: dict[fx.Graph, Any] = {}
        self.leaves: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return type(self.network).forward(self.network, *args, **kwargs)
        if self.versions != self._versions():
            raise NormPropError(
                "a parameter was changed while micro-batches share what is computed from it.\n"
                "Leave normprop.accumulate before optimizer.step(), and enter it again behind."
            )
        graph = self.network.graph
        lane, data = _split(graph)
        if graph not in self.values:
            self.values[graph] = fx.node.map_aggregate(lane(self.network), self._leaf)
        return data(self.network, self.values[graph], *args, **kwargs)

    def _leaf(self, value: Any) -> Any:
        """A value of the lane, cut off from it if gradients flow through it."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        self.leaves.append((value, leaf))
        return leaf

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.network.parameters()]

    def backward(self) -> None:
        """Send what the passes have left through the lane."""
        pairs = [(value, leaf.grad) for value, leaf in self.leaves if leaf.grad is not None]
        self.leaves.clear()
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])


def _split(graph: fx.Graph) -> _Split:
    """The lane of a graph, a function of the network, and the rest, one of the network, the lane's values and the data."""
    if graph not in _SPLITS:
        _SPLITS[graph] = _function(lane_graph(graph)), _function(_data_graph(graph))
    return _SPLITS[graph]


def _data_graph(graph: fx.Graph) -> fx.Graph:
    nodes = lane_nodes(graph)
    places = {node: i for i, node in enumerate(read_by_data(graph, nodes))}
    data = fx.Graph()
    values = data.placeholder("lane_values")
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node not in nodes or (node.op == "get_attr" and any(user not in nodes for user in node.users)):
            copies[node] = data.node_copy(node, copies.__getitem__)
        elif node in places:
            copies[node] = data.call_function(operator.getitem, (values, places[node]))
    return data


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """The Python function that a graph stands for; its first argument is the network."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    function: Callable[..., Any] = names["forward"]
    return function
