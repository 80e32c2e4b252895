"""Where the normalisation sites of a network go."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import fx, nn

from normprop.conversion import layers
from normprop.graph.walk import Walk
from normprop.rules import normalization
from normprop.rules.linear import convolution, linear, transposed_convolution

_LAYERS: dict[type[nn.Module], tuple[int, bool]] = {
    nn.Linear: (0, False),
    nn.Conv1d: (1, False), nn.Conv2d: (2, False), nn.Conv3d: (3, False),
    nn.ConvTranspose1d: (1, True), nn.ConvTranspose2d: (2, True), nn.ConvTranspose3d: (3, True),
}  # fmt: skip


@dataclass(frozen=True)
class LinearLayer:
    """A convolution or linear layer whose weight a site may rewrite.

    Attributes:
        path: of the module.
        module: the layer itself.
        dims: number of spatial dimensions, 0 for a linear layer.
        transposed: a transposed convolution.
    """

    path: str
    module: Any
    dims: int
    transposed: bool

    @property
    def channel(self) -> int:
        """Channel dimension of its input and output, from the end."""
        return -1 - self.dims

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return int(self.module.out_features if self.dims == 0 else self.module.out_channels)

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 otherwise."""
        return int(getattr(self.module, "groups", 1))

    @property
    def transposed_stride(self) -> int:
        """Product of the strides of a transposed convolution, else 0."""
        return math.prod(self.module.stride) if self.transposed else 0

    @property
    def can_center(self) -> bool:
        """Whether a filter has something left without its mean: more than one weight, and more than one input channel."""
        inputs = int(self.module.in_features if self.dims == 0 else self.module.in_channels)
        return inputs // self.groups > 1

    def pad(self, graph: fx.Graph, x: fx.Node) -> fx.Node:
        """The input as the functional call takes it: padded already, where the layer does not pad with zeros."""
        m = self.module
        if self.dims == 0 or m.padding_mode == "zeros":
            return x
        return graph.call_function(F.pad, (x, tuple(m._reversed_padding_repeated_twice)), {"mode": m.padding_mode})

    def write(self, graph: fx.Graph, x: fx.Node, scale: fx.Node) -> fx.Node:
        """The layer as a functional call on a padded input, scaled by its site."""
        m = self.module
        if self.dims == 0:
            return graph.call_function(layers.linear, (x, scale))
        if self.transposed:
            args = (x, scale, m.stride, m.padding, m.output_padding, m.groups, m.dilation)
            return graph.call_function(layers.transposed_convolution, args)
        padding = m.padding if m.padding_mode == "zeros" else 0
        return graph.call_function(layers.convolution, (x, scale, m.stride, padding, m.dilation, m.groups))


@dataclass(frozen=True)
class SitePlan:
    """One call of one site.

    Attributes:
        path: module path of the site.
        node: the node of the trace whose value the site gives: a BatchNorm's, or a bare layer's.
        source: the node whose moments the site reads.
        layer: the layer that takes effective weights; None for a per-channel affine.
        merged: the layer's own node where it is not `node`.
        channel: channel dimension of the value.
        center: centre the filters.
        call: index among the calls of this site.
    """

    path: str
    node: fx.Node
    source: fx.Node
    layer: LinearLayer | None
    merged: fx.Node | None
    channel: int
    center: bool
    call: int


def plan_sites(walk: Walk, normalize: Literal["batchnorm", "all"], center: bool) -> list[SitePlan]:
    """The sites of a network, in the order of its graph.

    Args:
        walk: the prepared model.
        normalize: "batchnorm" for a site in every BatchNorm's place; "all" for every linear layer besides, except those
            behind which no other follows (the output layers).
        center: centre the filters wherever that leaves something of them.
    """
    nodes = list(walk.graph_module.graph.nodes)
    linear = {node: layer for node in nodes if (layer := _linear_layer(walk, node)) is not None}
    bare = _inner(nodes, linear) if normalize == "all" else set()
    plans: list[SitePlan] = []
    calls: Counter[str] = Counter()
    for node in nodes:
        if is_batch_norm(walk, node):
            before = _argument(node)
            layer = linear.get(before) if len(before.users) == 1 else None
            if layer is not None and layer.channel % walk.values[before].dim() != 1:
                layer = None  # tokens: BatchNorm's channels are not the layer's
            path, channel, merged = str(node.target), 1, before if layer is not None else None
            source = before if layer is None else _argument(before)
        elif node in bare and not any(is_batch_norm(walk, user) for user in node.users):
            layer, merged, source = linear[node], None, _argument(node)
            path, channel = f"{layer.path}_norm", layer.channel % walk.values[node].dim()
        else:
            continue
        centred = center and layer is not None and layer.can_center
        plans.append(SitePlan(path, node, source, layer, merged, channel, centred, calls[path]))
        calls[path] += 1
    return plans


def nodes_behind(walk: Walk, plans: Sequence[SitePlan]) -> set[fx.Node]:
    """Nodes whose moments some site asks for: upstream of the sites, and no further than the sites before."""
    sites = {plan.node for plan in plans}
    needed: set[fx.Node] = set()
    stack = [plan.source for plan in plans]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in sites and node.op != "placeholder":
                stack.extend(walk.data_arguments(node))
    return needed


def is_batch_norm(walk: Walk, node: fx.Node) -> bool:
    """Whether a node normalises by batch statistics."""
    return node in walk.rules and walk.rules[node].function is normalization.batch_norm


def _argument(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    assert isinstance(source, fx.Node)
    return source


def _linear_layer(walk: Walk, node: fx.Node) -> LinearLayer | None:
    """The layer that a node runs, if its weight can be rewritten: torch's own forward, called with one argument."""
    if node.op != "call_module" or node not in walk.rules or len(node.args) + len(node.kwargs) != 1:
        return None
    module, function = walk.module(node), walk.rules[node].function
    base = next((c for c in type(module).__mro__ if c in _LAYERS and c.forward is type(module).forward), None)
    if base is None or function not in (convolution, transposed_convolution, linear):
        return None
    dims, transposed = _LAYERS[base]
    return LinearLayer(str(node.target), module, dims, transposed)


def _inner(nodes: list[fx.Node], layers: dict[fx.Node, LinearLayer]) -> set[fx.Node]:
    """Linear layers behind which another linear layer follows."""
    before: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(user in layers or user in before for user in node.users):
            before.add(node)
    return before & layers.keys()
