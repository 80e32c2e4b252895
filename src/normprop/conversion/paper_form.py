"""The paper's own form of a network: unit filters, and every activation standardised by two constants (eqs 9, 11, 12)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from normprop.channel_moments import Moments
from normprop.conversion import layers
from normprop.conversion.rewrite import Rewriter
from normprop.conversion.site_plan import SitePlan
from normprop.graph.walk import Walk, inner_nodes
from normprop.rules import arithmetic, combine, elementwise, pooling, shape, stochastic
from normprop.rules.composed import composed, full_moments
from normprop.sites import site as sites
from normprop.sites.reference import Scale
from normprop.sites.rows import Form, from_rows, to_rows

# What hands a standardised tensor on; the paper pools standardised tensors without a further word (§4).
_KEEPERS = frozenset(f for family in (combine, pooling, shape, stochastic) for f in vars(family).values() if callable(f))
_ACTIVATIONS = frozenset([elementwise.named_activation, elementwise.module_activation, composed])


def standardiser(moments: Moments) -> Scale:
    """Factor ``1/c₁`` and offset ``−c₂/c₁`` that standardise an activation with these moments ([P] eq. 12)."""
    factor = 1.0 / moments.std
    return Scale(None, factor.reshape(-1), (-moments.mean * factor).reshape(-1))


def jacobian_gain(walk: Walk, node: fx.Node) -> float:
    """The γ of a site: ``1/√(E f'² / Var f)`` at N(0, 1) for the activation behind it, 1 if none is ([P] eq. 7).

    With it a layer's Jacobian is isometric on average; 1/1.21 for ReLU.
    """
    parameter = lambda n: operator.attrgetter(str(n.target))(walk.graph_module)
    while node.users:
        user = next(iter(node.users))
        function = walk.rules[user].function if user in walk.rules else None
        if function in _ACTIVATIONS:
            value = walk.values[user]
            standard = Moments(torch.zeros((1,) * value.dim()), torch.ones((1,) * value.dim()))
            module = walk.module(user) if user.op == "call_module" else None
            call = walk.call(user, dict.fromkeys(walk.data_arguments(user), standard).__getitem__, parameter, module)
            full = full_moments(call)
            assert full is not None
            return float((full.var / full.slope).sqrt().mean().detach())
        if function not in _KEEPERS:
            return 1.0
        node = user
    return 1.0


@torch.no_grad()
def start_as_printed_(root: nn.Module, walk: Walk, plans: Sequence[SitePlan]) -> None:
    """Set γ to each site's `jacobian_gain`, β to 0, and scale the filters of sites to unit length ([P] §4).

    Args:
        root: the module tree that holds the sites already; changed in place.
        walk: the walk that the plans belong to.
        plans: the sites.
    """
    for plan in plans:
        site = root.get_submodule(plan.path)
        if isinstance(site.weight, Tensor):
            site.weight.fill_(jacobian_gain(walk, plan.node))
        if isinstance(site.bias, Tensor):
            site.bias.zero_()
        if plan.layer is not None:
            weight = plan.layer.module.weight
            form = Form(plan.layer.groups, plan.layer.transposed)
            rows = to_rows(weight, form)
            length = rows.norm(dim=-1, keepdim=True)
            weight.copy_(from_rows(rows / torch.where(length > 0, length, 1.0), weight, form))


class PaperRewriter(Rewriter):
    """Writes eqs 9, 11 and 12 at every site and behind every activation of a standardised tensor.

    The paper treats chains. Here a residual sum of two standardised tensors is divided by √2, which keeps it standardised;
    a product (a gate) is left as it is, and activations of what is not standardised are not touched.
    """

    def __init__(self, walk: Walk, plans: Sequence[SitePlan], inputs: Sequence[tuple[str, str] | None]) -> None:
        super().__init__(walk, plans, inputs)
        self.standard: set[fx.Node] = set()
        self.inner = inner_nodes(walk.graph_module.graph, walk.fused)

    def _follow(self, node: fx.Node) -> None:
        """Mark a tensor that is standardised, or make it so."""
        if node.op == "placeholder":
            self.standard.add(node)
        if node not in self.walk.rules or node in self.inner:
            return
        function = self.walk.rules[node].function
        sources = self.walk.data_arguments(node)
        if not all(source in self.standard for source in sources):
            return
        if function in _ACTIVATIONS:
            scale, channel = self._call(standardiser, self._constants(node)), 1 - self.walk.values[node].dim()
            self.data[node] = self._call(layers.affine, self.data[node], scale, channel)
        elif function is arithmetic.add and len(sources) == 2:
            factor = 0.5 if sources[0] is sources[1] else math.sqrt(0.5)
            self.data[node] = self._call(torch.mul, self.data[node], factor)
        elif function not in _KEEPERS:
            return
        self.standard.add(node)

    def _constants(self, node: fx.Node) -> fx.Node:
        """The moments of an activation of a standard normal input, whose channels lie along dimension 1."""
        rank = self.walk.values[node].dim()
        shift = self.graph.get_attr(f"{next(iter(self.plans.values())).path}.shift")
        standard = self._call(sites.standard_normal, shift, (1,) * rank)
        module = self.graph.get_attr(str(node.target)) if node.op == "call_module" else None
        function, args, kwargs = self.walk.call(node, lambda _: standard, self.data.__getitem__, module)
        return self._call(function, *args, **kwargs)

    def _write_site(self, plan: SitePlan) -> None:
        self.data[plan.node] = self._scaled(plan, None)
        self.standard.add(plan.node)
