"""From a walk to a graph with two lanes: the data lane is the plain network, the moment lane stands beside it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from normprop.conversion import layers
from normprop.conversion.site_plan import SitePlan, nodes_behind
from normprop.graph.walk import Kind, Walk
from normprop.sites import site as sites


class Rewriter:
    """Writes the converted graph of one walk.

    Args:
        walk: the prepared model.
        plans: its sites.
        inputs: for every input of the network the paths of two parameters with its mean and variance, or None where it is
            standard normal.
    """

    def __init__(self, walk: Walk, plans: Sequence[SitePlan], inputs: Sequence[tuple[str, str] | None]) -> None:
        self.walk = walk
        self.plans = {plan.node: plan for plan in plans}
        self.merged = {plan.merged for plan in plans}
        self.inputs = iter(inputs)
        self.graph = fx.Graph()
        self.data: dict[fx.Node, fx.Node] = {}
        self.lane: dict[fx.Node, fx.Node] = {}
        self.needed = nodes_behind(walk, plans)

    def run(self) -> fx.Graph:
        """The new graph."""
        for node in self.walk.graph_module.graph.nodes:
            if node in self.merged:
                continue
            if node in self.plans:
                self._write_site(self.plans[node])
            else:
                self.data[node] = self.graph.node_copy(node, self.data.__getitem__)
                self._follow(node)
        return self.graph

    def _follow(self, node: fx.Node) -> None:
        """Write the lane's side of a node that is no site."""
        if node.op == "placeholder" and self.walk.kinds[node] is Kind.DATA:
            given = next(self.inputs)
            if node in self.needed:
                self.lane[node] = self._write_input(node, given)
        elif node in self.needed:
            self.lane[node] = self._write_rule(node)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def _write_input(self, node: fx.Node, given: tuple[str, str] | None) -> fx.Node:
        if given is not None:
            return self._call(sites.given_moments, *(self.graph.get_attr(path) for path in given))
        like = next(p for p in self.plans.values())
        shape = self.walk.values[node].shape
        ones = (1, shape[1], *(1,) * (len(shape) - 2)) if len(shape) > 1 else (1,)
        return self._call(sites.standard_normal, self.graph.get_attr(f"{like.path}.shift"), ones)

    def _write_rule(self, node: fx.Node) -> fx.Node:
        if self.walk.rules[node].training_only:
            return self.lane[self.walk.data_arguments(node)[0]]
        module = self.graph.get_attr(str(node.target)) if node.op == "call_module" else None
        function, args, kwargs = self.walk.call(node, self.lane.__getitem__, self.data.__getitem__, module)
        return self._call(function, *args, **kwargs)

    def _write_site(self, plan: SitePlan) -> None:
        self.data[plan.node] = self._scaled(plan, self.lane[plan.source])
        if plan.node in self.needed:
            rank = self.walk.values[plan.node].dim()
            site = self.graph.get_attr(plan.path)
            moments = self._call(sites.site_moments, (site, rank, plan.channel))
            self.lane[plan.node] = self._call(operator.getitem, moments, 0)

    def _scaled(self, plan: SitePlan, moments: fx.Node | None) -> fx.Node:
        """The site's layer on its input, or the affine in the site's place; `moments` None for standardised input."""
        site, x, layer = self.graph.get_attr(plan.path), self.data[plan.source], plan.layer
        weight = None
        if layer is not None:
            x = layer.pad(self.graph, x)
            weight = self.graph.get_attr(f"{layer.path}.weight")
        scales = self._call(sites.site_scales, (weight, site, moments, _options(plan)))
        scale = self._call(operator.getitem, scales, 0)
        from_end = plan.channel - self.walk.values[plan.node].dim()
        scaled = self._call(layers.affine, x, scale, from_end) if layer is None else layer.write(self.graph, x, scale)
        scaled.meta["scope"] = plan.path
        return scaled


def _options(plan: SitePlan) -> dict[str, Any]:
    """What the arithmetic of a site depends on, defaults left out."""
    layer = plan.layer
    options: dict[str, Any] = {"channel": plan.channel if layer is None else layer.channel}
    if layer is not None and layer.groups > 1:
        options["groups"] = layer.groups
    if layer is not None and layer.transposed:
        options["transposed_stride"] = layer.transposed_stride
    if plan.center:
        options["center"] = True
    if plan.call:
        options["call"] = plan.call
    return options
