"""The paper's own form of a network: unit filters, and every layer's input standardised by constants.

Arpit et al. (2016), eqs 9, 11 and 12, divide by ‖W‖ and standardise an activation by its moments at N(0, 1), whatever γ and
β are. An activation that a network runs by itself can't be changed, so what reads it, the next linear layer, standardises
it: the same function, borders that are padded with zeros included. The paper treats chains. A residual sum is standardised
by its variance; a product (a gate) is left as it is, and so is what comes after it until the next site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.conversion.site_plan import SitePlan
from normprop.graph.node import Node
from normprop.graph.rule_search import inner_nodes
from normprop.graph.walk import Walk
from normprop.rules import arithmetic, combine, elementwise, pooling, shape, stochastic
from normprop.rules.composed import composed, full_moments
from normprop.sites.rows import Form, from_rows, to_rows

# What hands a standardised tensor on; the paper pools standardised tensors without a further word (§4).
_KEEPERS = frozenset(f for family in (combine, pooling, shape, stochastic) for f in vars(family).values() if callable(f))
POOLINGS = frozenset(f for f in vars(pooling).values() if callable(f))
_ACTIVATIONS = frozenset([elementwise.named_activation, elementwise.module_activation, composed])


def jacobian_gain(walk: Walk, node: Node) -> float:
    """The γ of a site: ``1/√(E f'² / Var f)`` at N(0, 1) for the activation after it, 1 if none is (eq. 7).

    With it a layer's Jacobian is isometric on average; 1/1.21 for ReLU.
    """
    while node.users:
        user = next(iter(node.users))
        function = walk.rules[user].function if user in walk.rules else None
        if function in _ACTIVATIONS:
            value = user.value
            standard = Moments(torch.zeros((1,) * value.dim()), torch.ones((1,) * value.dim()))
            module = walk.module(user) if user.op == "module" else None
            call = walk.call(user, dict.fromkeys(walk.data_arguments(user), standard).__getitem__, walk.known, module)
            full = full_moments(call)
            assert full is not None
            return float((full.var / full.slope).sqrt().mean().detach())
        if function not in _KEEPERS:
            return 1.0
        node = user
    return 1.0


@torch.no_grad()
def start_as_printed_(root: nn.Module, walk: Walk, plans: Sequence[SitePlan]) -> None:
    """Set γ to each site's `jacobian_gain`, β to 0, and scale the filters of sites to unit length (§4).

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
            weight: Any = root.get_submodule(plan.layer.path).weight
            form = Form(plan.layer.groups, plan.layer.transposed)
            rows = to_rows(weight, form)
            length = rows.norm(dim=-1, keepdim=True)
            weight.copy_(from_rows(rows / torch.where(length > 0, length, 1.0), weight, form))


def standardised(walk: Walk, plans: Sequence[SitePlan]) -> set[Node]:
    """Nodes whose moments are constants: inputs, what sites give, and activations, poolings and sums of these."""
    sites = {plan.node for plan in plans}
    inner = inner_nodes(walk.nodes, walk.fused)
    found: set[Node] = set()
    for node in walk.nodes:
        if node.op == "input" or node in sites:
            found.add(node)
        elif node in walk.rules and node not in inner and all(source in found for source in walk.data_arguments(node)):
            function = walk.rules[node].function
            if function in _ACTIVATIONS or function in _KEEPERS or function is arithmetic.add:
                found.add(node)
    return found
