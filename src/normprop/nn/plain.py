"""A layer, its activation and an affine map as one graph of plain torch operations."""

import copy
import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx


def plain_graph(
    layer: torch.nn.Module | None,
    fn: Callable[[Tensor], Tensor],
    scale: Tensor | float,
    shift: Tensor | float,
) -> fx.GraphModule:
    """`shift + scale · fn(layer(input))` with nothing of ours inside, for deployment and export.

    A graph and not an `nn.Sequential`, because torch.nn has no module for an affine map that takes any number of
    leading dimensions at the cost of one elementwise pass: a diagonal `Linear` costs a matrix product, a depthwise 1×1
    convolution fixes the rank of its input.

    >>> plain_graph(None, torch.relu, 2.0, -1.0)(torch.tensor([-1.0, 1.0]))
    tensor([-1.,  1.])
    """
    root, graph = torch.nn.Module(), fx.Graph()
    value = graph.placeholder("input")
    if layer is not None:
        root.add_module("layer", layer)
        value = graph.call_module("layer", (value,))
    if isinstance(fn, torch.nn.Module):
        root.add_module("activation", copy.deepcopy(fn))
        value = graph.call_module("activation", (value,))
    else:
        value = graph.call_function(fn, (value,))
    if isinstance(scale, Tensor) and isinstance(shift, Tensor):
        root.register_parameter("scale", torch.nn.Parameter(scale.detach().clone()))
        root.register_parameter("shift", torch.nn.Parameter(shift.detach().clone()))
        value = graph.call_function(torch.addcmul, (graph.get_attr("shift"), value, graph.get_attr("scale")))
    else:
        value = graph.call_function(operator.add, (graph.call_function(operator.mul, (value, scale)), shift))
    graph.output(value)
    return fx.GraphModule(root, graph)
