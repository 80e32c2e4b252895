"""The paper's own form of a network: unit filters, and every activation standardised by two constants (eqs 9, 11, 12)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from normprop import sites
from normprop.channel_moments import Moments, safe_sqrt
from normprop.plan import SitePlan
from normprop.rewrite import Rewriter
from normprop.rules import arithmetic, combine, elementwise, pooling, shape, stochastic
from normprop.rules.linear import wide
from normprop.sites import Site, apply_affine, site_moments
from normprop.walk import Walk

# What hands a standardised tensor on; the paper pools standardised tensors without a further word (§4).
_KEEPERS = frozenset(f for family in (combine, pooling, shape, stochastic) for f in vars(family).values() if callable(f))
_ACTIVATIONS = frozenset([elementwise.named_activation, elementwise.module_activation])


def unit_weight(weight: Tensor, site: Site, *, groups: int = 1, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """``γ W/‖W‖`` with one Frobenius norm a filter, and β ([P] eqs 9 and 11).

    Args:
        weight: the layer's weight.
        site: whose γ and β are used.
        groups: of a grouped convolution.
        transposed: filters lie along dimension 1 of each group.

    Returns:
        Effective weight in the weight's own shape and dtype, bias ``(O,)``. A filter of zeros stays zero.
    """
    filters = wide(weight).unflatten(0, (groups, -1))
    others = (1, *range(3, filters.dim())) if transposed else tuple(range(2, filters.dim()))
    norm = safe_sqrt(filters.square().sum(others, keepdim=True))
    unit = filters / torch.where(norm > 0, norm, 1.0)
    bias = torch.zeros_like(wide(site.shift)) if site.bias is None else wide(site.bias)
    if site.weight is not None:
        shape_of = [groups, 1, -1] if transposed else [groups, -1, 1]
        unit = unit * wide(site.weight).reshape(*shape_of, *(1,) * (filters.dim() - 3))
    return unit.flatten(0, 1).to(weight.dtype), bias.to(weight.dtype)


def standardiser(moments: Moments) -> tuple[Tensor, Tensor]:
    """Factor ``1/c₁`` and offset ``−c₂/c₁`` that standardise an activation with these moments ([P] eq. 12)."""
    factor = 1.0 / moments.std
    return factor, -moments.mean * factor


def gain_and_bias(site: Site, *, rank: int, channel: int) -> tuple[Tensor, Tensor]:
    """Factor γ and offset β of a site whose input is standardised already."""
    moments = site_moments(site, rank, channel)
    return (
        torch.ones_like(moments.mean) if site.weight is None else wide(site.weight).reshape(moments.var.shape)
    ), moments.mean


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
            full = elementwise.full_moments(call)
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
            plain = Site(None, None, wide(weight).new_zeros(plan.layer.channels), wide(weight).new_ones(1))
            weight.copy_(unit_weight(weight, plain, groups=plan.layer.groups, transposed=plan.layer.transposed)[0])


class PaperRewriter(Rewriter):
    """Writes eqs 9, 11 and 12 at every site and behind every activation of a standardised tensor.

    The paper treats chains. Here a residual sum of two standardised tensors is divided by √2, which keeps it standardised;
    a product (a gate) is left as it is, and activations of what is not standardised are not touched.
    """

    def __init__(self, walk: Walk, plans: Sequence[SitePlan], inputs: Sequence[tuple[str, str] | None]) -> None:
        super().__init__(walk, plans, inputs)
        self.standard: set[fx.Node] = set()

    def run(self) -> fx.Graph:
        """The new graph."""
        for node in self.walk.graph_module.graph.nodes:
            if node in self.merged:
                continue
            if node in self.plans:
                self._write_site(self.plans[node])
                self.standard.add(node)
                continue
            self.data[node] = self.graph.node_copy(node, self.data.__getitem__)
            self._follow(node)
        self.graph.lint()
        return self.graph

    def _follow(self, node: fx.Node) -> None:
        """Mark a tensor that is standardised, or make it so."""
        if node.op == "placeholder":
            self.standard.add(node)
        if node not in self.walk.rules:
            return
        function = self.walk.rules[node].function
        sources = self.walk.data_arguments(node)
        if not all(source in self.standard for source in sources):
            return
        if function in _ACTIVATIONS:
            self.data[node] = self._affine(self.data[node], self._call(standardiser, self._constants(node)))
        elif function is arithmetic.add and len(sources) == 2:
            factor = 0.5 if sources[0] is sources[1] else math.sqrt(0.5)
            self.data[node] = self._call(torch.mul, self.data[node], factor)
        elif function not in _KEEPERS:
            return
        self.standard.add(node)

    def _affine(self, x: fx.Node, pair: fx.Node) -> fx.Node:
        factor, offset = (self._call(operator.getitem, pair, i) for i in (0, 1))
        return self._call(apply_affine, x, factor, offset)

    def _constants(self, node: fx.Node) -> fx.Node:
        """The moments of an activation of a standard normal input."""
        rank = self.walk.values[node].dim()
        shift = self.graph.get_attr(f"{next(iter(self.plans.values())).path}.shift")
        standard = self._call(sites.standard_normal, shift, (1,) * rank)
        module = self.graph.get_attr(str(node.target)) if node.op == "call_module" else None
        function, args, kwargs = self.walk.call(node, lambda _: standard, self.data.__getitem__, module)
        return self._call(function, *args, **kwargs)

    def _write_site(self, plan: SitePlan) -> None:
        site = self.graph.get_attr(plan.path)
        x = self.data[plan.source]
        if plan.layer is None:
            rank = self.walk.values[plan.node].dim()
            self.data[plan.node] = self._affine(x, self._call(gain_and_bias, site, rank=rank, channel=plan.channel))
            return
        layer = plan.layer
        x = layer.pad(self.graph, x)
        options: dict[str, Any] = {"groups": layer.groups} if layer.groups > 1 else {}
        if layer.transposed:
            options["transposed"] = True
        pair = self._call(unit_weight, self.graph.get_attr(f"{layer.path}.weight"), site, **options)
        weight, bias = (self._call(operator.getitem, pair, i) for i in (0, 1))
        self.data[plan.node] = layer.write(self.graph, x, weight, bias)
