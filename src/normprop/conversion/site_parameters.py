"""Parameters that nothing but sites reads."""

from __future__ import annotations

from typing import Any

from torch import nn

from normprop.conversion.site_plan import SitePlan
from normprop.graph.walk import Walk


def freeze_biases(root: nn.Module, walks: dict[bool, Walk], plans: dict[bool, list[SitePlan]]) -> None:
    """Freeze biases that would never see a gradient: every call of their layers is normalised, and nothing reads them."""
    read: set[str] = set()
    for mode, walk in walks.items():
        covered = {(p.layer.path, p.layer_call) for p in plans[mode] if p.layer is not None}
        calls: dict[str, int] = {}
        for node in walk.nodes:
            if node.op == "tensor":
                read.add(node.target)
            elif node.op == "module":
                call = calls.get(node.target, 0)
                calls[node.target] = call + 1
                if (node.target, call) not in covered:
                    read |= {f"{node.target}.{name}" for name, _ in walk.module(node).named_parameters()}
    names: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for plan in (p for of in plans.values() for p in of if p.layer is not None):
        assert plan.layer is not None
        bias = root.get_submodule(plan.layer.path).bias
        if bias is not None and not any(name in read for name in names[id(bias)]) and len(names[id(bias)]) == 1:
            bias.requires_grad_(False)


def filters_of_sites(root: nn.Module, walks: dict[bool, Walk], plans: dict[bool, list[SitePlan]]) -> list[dict[str, Any]]:
    """Weights that nothing but sites reads, so that dividing a filter by a number changes nothing.

    Returns:
        An entry per weight: its path, and ``channel_dim`` and ``groups`` as `filter_view` takes them.
    """
    read: set[int] = set()
    found: dict[int, dict[str, Any]] = {}
    for mode, walk in walks.items():
        covered = {(p.layer.path, p.layer_call): p for p in plans[mode] if p.layer is not None}
        for plan in covered.values():
            assert plan.layer is not None
            layout = {"channel_dim": int(plan.layer.transposed), "groups": plan.layer.groups}
            found.setdefault(id(root.get_submodule(plan.layer.path).weight), layout)
        calls: dict[str, int] = {}
        for node in walk.nodes:
            if node.op == "tensor":
                value = root.get_parameter(node.target) if node.target in dict(root.named_parameters()) else None
                read |= {id(value)}
            elif node.op == "module":
                call = calls.get(node.target, 0)
                calls[node.target] = call + 1
                if (node.target, call) not in covered:
                    read |= {id(p) for p in root.get_submodule(node.target).parameters()}
    own = {id(p): name for name, p in root.named_parameters()}
    return [{"weight": own[w], **layout} for w, layout in found.items() if w in own and w not in read]
