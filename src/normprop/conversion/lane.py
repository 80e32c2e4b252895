"""The moment lane of a converted graph: what depends on parameters alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from normprop.channel_moments import Moments
from normprop.conversion import layers
from normprop.sites.reference import Scale
from normprop.sites.site import Site, site_scales

# Operations of the data lane whose second argument is the scale of a site.
_SCALED = frozenset([layers.linear, layers.convolution, layers.transposed_convolution, layers.affine])


@dataclass(frozen=True)
class SiteCall:
    """How a converted graph calls one site.

    Attributes:
        scales: the `site_scales` node.
        index: of the site among those which that node computes together.
        weight: node of the weight of the layer before the site; None if there is no layer.
        site: node of the site.
        moments: lane node of the moments that the site reads; None for standardised input.
        options: of `site_scales`.
    """

    scales: fx.Node
    index: int
    weight: fx.Node | None
    site: fx.Node
    moments: fx.Node | None
    options: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Module path of the site."""
        return str(self.site.target)

    @property
    def layer_path(self) -> str:
        """Module path of the layer before the site."""
        assert self.weight is not None
        return str(self.weight.target).rpartition(".")[0]


def site_calls(graph: fx.Graph) -> dict[fx.Node, SiteCall]:
    """The site of every data node that a site scales, in the order of the graph."""
    return {node: _site_call(node.args[1]) for node in graph.nodes if node.target in _SCALED and _is_entry(node.args[1])}


def _is_entry(node: Any) -> bool:
    """Whether a node takes one site's scale out of what `site_scales` returns (the paper's constants are none)."""
    return node.target is operator.getitem and node.args[0].target is site_scales


def _site_call(item: Any) -> SiteCall:
    scales, index = item.args
    return SiteCall(scales, index, *scales.args[index])


def lane_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that do not depend on any input: parameters, the moment lane, scales."""
    lane: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and all(a in lane for a in node.all_input_nodes):
            lane.add(node)
    return lane


def read_by_data(graph: fx.Graph, lane: set[fx.Node]) -> list[fx.Node]:
    """The nodes of the lane, parameters aside, that something outside it reads."""
    return [n for n in graph.nodes if n in lane and n.op != "get_attr" and any(user not in lane for user in n.users)]


def lane_graph(graph: fx.Graph) -> fx.Graph:
    """The moment lane alone: no input, and what `read_by_data` names as a tuple."""
    lane = lane_nodes(graph)
    alone = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in lane and (node.op != "get_attr" or any(user in lane for user in node.users)):
            copies[node] = alone.node_copy(node, copies.__getitem__)
    alone.output(tuple(copies[node] for node in read_by_data(graph, lane)))
    return alone


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """node → values that nothing after it reads."""
    seen: set[fx.Node] = set()
    frees: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                frees.setdefault(node, []).append(used)
    return frees


class LaneValues:
    """Values of a graph's moment lane, each computed when it is asked for.

    Args:
        root: the modules and parameters that the graph names.
        graph: a converted graph.

    Attributes:
        nodes: the lane.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.interpreter = fx.Interpreter(root, garbage_collect_values=False, graph=graph)
        self.nodes = lane_nodes(graph)
        self.known: dict[fx.Node, Any] = {}

    def __getitem__(self, node: fx.Node) -> Any:
        stack = [node]
        while stack:
            if stack[-1] in self.known:
                stack.pop()
                continue
            missing = [a for a in stack[-1].all_input_nodes if a not in self.known]
            if missing:
                stack.extend(missing)
            else:
                current = stack.pop()
                self.known[current] = self.run(current, self.known.__getitem__)
        return self.known[node]

    def forget(self, parameter: fx.Node) -> None:
        """Drop what was computed from a parameter or module that has changed since."""
        stale = list(parameter.users)
        while stale:
            node = stale.pop()
            if node in self.nodes and self.known.pop(node, None) is not None:
                stale.extend(node.users)

    def run(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """One node's operation on the values of what it reads."""
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def scale(self, call: SiteCall) -> Scale:
        """The scale of one site, computed for itself from the constants that it has now."""
        return site_scales(self.arguments(call))[0]

    def arguments(self, call: SiteCall) -> tuple[Tensor | None, Site, Moments | None, Mapping[str, Any]]:
        """What `site_scales` takes for one site."""
        weight, moments = (None if node is None else self[node] for node in (call.weight, call.moments))
        return weight, self[call.site], moments, call.options
