"""From a walk and its sites to the nodes of a moment lane."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normprop.channel_moments import Moments
from normprop.conversion.entry import Entry
from normprop.conversion.paper_form import POOLINGS, standardised
from normprop.conversion.program import constant
from normprop.conversion.site_plan import SitePlan, argument, is_site, linear_layer, nodes_behind
from normprop.graph.node import HERE, Node, map_nodes
from normprop.graph.walk import Walk
from normprop.rules import arithmetic, elementwise, linear
from normprop.rules.composed import composed
from normprop.sites import site as sites
from normprop.sites.site import Site

# Rules of what may leave a channel nearly constant, and of layers, whose scale nobody is to feel.
_ACTIVATIONS = (elementwise.module_activation, elementwise.named_activation, composed)
_LAYERS = (linear.linear, linear.convolution, linear.transposed_convolution)


class LaneWriter:
    """Writes the lane's nodes for sites of one walk.

    Args:
        walk: the recorded model.
        plans: all of its sites.
        wanted: the sites to write.
        inputs: for every input of the network the paths of two parameters with its mean and variance, or None where it is
            standard normal.
        passing: noise that this walk has and that of evaluation has not. As with dropout, a lane follows its mean alone.
    """

    def __init__(
        self,
        walk: Walk,
        plans: Sequence[SitePlan],
        wanted: Sequence[SitePlan],
        inputs: Sequence[tuple[str, str] | None],
        method: str = "exact",
        passing: Collection[Node] = (),
    ) -> None:
        self.walk = walk
        self.passing = passing
        self.plans = {plan.node: plan for plan in plans}
        self.wanted = wanted
        self.method = method
        self.inputs = dict(zip(walk.record.inputs, inputs, strict=True))
        self.lane: dict[Node, Node] = {}
        self.known: dict[Node, Node] = {}
        self.modules: dict[str, Node] = {}
        self.tensors: dict[str, Node] = {}
        self.constant = standardised(walk, plans) if method == "paper" else set()

    def run(self) -> list[Entry]:
        """An entry per wanted site."""
        needed = nodes_behind(self.walk, self.wanted, list(self.plans.values()))
        if self.method == "paper":
            needed = self.constant & needed | self._read_by_layers()
        for node in self.walk.nodes:
            if node in needed:
                self.lane[node] = self._moments(node)
        return [self._entry(plan) for plan in self.wanted]

    def _moments(self, node: Node) -> Node:
        """The lane's side of a node."""
        if node.op == "input":
            return self._input(node)
        found = self._ruled(node)
        detaches = node.target in ("detach", torch.detach) or (node.target is getattr and node.args[1] == "data")
        return Node("call", detached, (found,)) if node.detached or detaches else found

    def _ruled(self, node: Node) -> Node:
        """What the rule of an operation, or the site in its place, gives."""
        if node in self.plans:
            plan = self.plans[node]
            rank = node.value.dim()
            if self.method == "paper":
                shape = tuple(node.value.shape[d] if d == self._channel(plan) else 1 for d in range(rank))
                return Node("call", sites.standard_normal, (self._tensor(f"{plan.path}.shift"), shape))
            return Node("call", sites.site_moments, ((self._module(plan.path), rank, self._channel(plan)),))
        if is_site(self.walk, node):
            return Node("call", sites.site_moments, ((self._module(node.target), node.value.dim(), 1),))
        rule = self.walk.rules[node]
        if rule.training_only or (self.method == "paper" and rule.function in POOLINGS):
            return self.lane[self.walk.data_arguments(node)[0]]
        module = self._module(node.target) if node.op == "module" else None
        read = self.lane.__getitem__ if node in self.passing else self._certain
        function, args, kwargs = self.walk.call(node, read, self._known, module, HERE)
        return Node("call", function, args, kwargs)

    def _certain(self, node: Node) -> Node:
        """The lane's side of a node for those who read it beside data: of passing noise its mean."""
        return Node("call", certain, (self.lane[node],)) if node in self.passing else self.lane[node]

    def _entry(self, plan: SitePlan) -> Entry:
        site, layer = self._module(plan.path), plan.layer
        moments = self.lane.get(plan.source)
        if self.method == "paper" and (layer is not None or self._is_standard(plan.source)):
            moments = None  # the layer's input is standardised
        eps = 0.0 if moments is None or self.method == "paper" else self._epsilon(plan)
        if eps:
            moments = Node("call", sites.widened, (moments, eps))
        options = {"channel": 1} if layer is None else layer.options()
        if plan.call:
            options["call"] = plan.call
        weight = None if layer is None else self._tensor(f"{layer.path}.weight")
        scale = Node("call", sites.site_scales, ((weight, site, moments, options),))
        path = None if layer is None else layer.path
        return Entry(*plan.key, path, scale, moments, options, plan.bare, plan.node.value.dim(), self._channel(plan), eps)

    def _epsilon(self, plan: SitePlan) -> float:
        """BatchNorm's ε where what a site reads may hardly vary: no layer, or a depthwise one, behind an activation."""
        is_narrow = plan.layer is None or plan.layer.inputs == 1
        return plan.eps if is_narrow and self._is_behind_activation(plan.source) else 0.0

    def _is_behind_activation(self, node: Node) -> bool:
        """Whether a tensor comes from an activation or product, by whatever stands between that and the layers before."""
        stack, seen = [node], set[Node]()
        while stack:
            node = stack.pop()
            if node in seen or node.op == "input" or node in self.plans or is_site(self.walk, node):
                continue
            seen.add(node)
            function, arguments = self.walk.rules[node].function, self.walk.data_arguments(node)
            if function in _ACTIVATIONS or (function is arithmetic.mul and len(arguments) > 1):
                return True
            if function not in _LAYERS:
                stack.extend(arguments)
        return False

    def standards(self) -> dict[str, list[Node | None]]:
        """For every call of every linear layer the moments by which its input is standardised, None for not at all."""
        found: dict[str, list[Node | None]] = {}
        for node in self.walk.nodes:
            if linear_layer(self.walk, node) is None:
                continue
            source = argument(node)
            standard = source in self.constant and not self._is_standard(source)
            found.setdefault(node.target, []).append(self.lane[source] if standard else None)
        return {path: calls for path, calls in found.items() if any(calls)}

    def _read_by_layers(self) -> set[Node]:
        """Nodes with constant moments that some linear layer reads, and what these moments are made of."""
        stack = [argument(n) for n in self.walk.nodes if linear_layer(self.walk, n) is not None]
        found: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in self.constant and node not in found:
                found.add(node)
                if node not in self.plans and node.op != "input":
                    stack.extend(self.walk.data_arguments(node))
        return found

    def _is_standard(self, node: Node) -> bool:
        """Whether a node has mean 0 and variance 1 as it is."""
        return node in self.plans or (node.op == "input" and self.inputs[node] is None)

    @staticmethod
    def _channel(plan: SitePlan) -> int:
        """Where the channels of a site's value lie: BatchNorm has them along dimension 1, a bare layer where they are."""
        rank: int = plan.node.value.dim()
        return plan.layer.channel % rank if plan.bare and plan.layer is not None else 1

    def _input(self, node: Node) -> Node:
        given = self.inputs[node]
        if given is not None:
            return Node("call", sites.given_moments, tuple(self._tensor(path) for path in given))
        shape = node.value.shape
        ones = (1, shape[1], *(1,) * (len(shape) - 2)) if len(shape) > 1 else (1,)
        return Node("call", sites.standard_normal, (self._tensor(f"{next(iter(self.plans.values())).path}.shift"), ones))

    def _known(self, node: Node) -> Node:
        """The lane's node of a tensor made of parameters; one made of none of them is a constant."""
        if node not in self.known:
            self.known[node] = self._made(node)
        return self.known[node]

    def _made(self, node: Node) -> Node:
        if node.op == "tensor":
            return self._tensor(node.target)
        if not any(n.op == "tensor" for n in upstream(node)):
            return constant(self.walk.known(node))
        args, kwargs = map_nodes((node.args, node.kwargs), self._known)
        if node.op == "module":
            return Node("call", run_module, (self._module(node.target), *args), kwargs)
        return Node("call", node.target, args, kwargs)

    def _module(self, path: str) -> Node:
        """A module, and of which class it is, so that one that takes its place later is noticed."""
        if path not in self.modules:
            self.modules[path] = Node("module", path, (self._kind(path),))
        return self.modules[path]

    def _tensor(self, path: str) -> Node:
        """A parameter or buffer, and the class of the module that holds it."""
        if path not in self.tensors:
            self.tensors[path] = Node("tensor", path, (self._kind(path.rpartition(".")[0]),))
        return self.tensors[path]

    def _kind(self, path: str) -> type[nn.Module]:
        is_planned = any(plan.path == path for plan in self.plans.values())
        return Site if is_planned else type(self.walk.model.get_submodule(path))


def certain(moments: Moments) -> Moments:
    """A number that is what it is on average."""
    return Moments(moments.mean, torch.zeros_like(moments.mean))


def passing_noise(walk: Walk, evaluation: Walk) -> set[Node]:
    """Noise of training alone: what one walk has and that of evaluation hasn't."""
    kept = {(node.name, node.source) for node in evaluation.record.noise()}
    return {node for node in walk.record.noise() if (node.name, node.source) not in kept}


def detached(moments: Any) -> Any:
    """The same moments without their gradients: of what runs where the network has none."""
    if isinstance(moments, tuple):
        return tuple(detached(m) for m in moments)
    if not isinstance(moments, Moments):
        return moments
    return replace(moments, mean=moments.mean.detach(), var=moments.var.detach())


def run_module(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module on parameters."""
    return module(*args, **kwargs)


def upstream(node: Node) -> set[Node]:
    """A node and all that it is made of."""
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().inputs:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found
