"""How much of their mean the filters of a fresh network keep: in the course of training, and at its start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from normprop.conversion.lane import Lane
from normprop.sites.rows import from_rows, to_rows
from normprop.sites.site import site_operands

# Power of a filter's number of inputs that is left of its mean. ½ follows from what is said at `center_partly`.
COMMON = 0.5
# Every how manieth filter starts with the mean that it was given.
EVERY = 2


@torch.no_grad()
def center_partly(network: nn.Module, lane: Lane, fresh: Collection[str]) -> None:
    """Leave filters before fresh sites n^-½ of the mean that `convert` takes: what a filter's n inputs have in common varies
    up to n times as much as anything else, and moves an output no more than that then (derived).

    The mean of every second filter is multiplied by √n, so that it starts as it was. Its share of the filter is learned as
    slowly as that of the others. Weights that several modules hold, or that something computes, stay.

    Args:
        network: a converted network; its weights and its sites' `center` are changed.
        lane: its lane.
        fresh: paths of sites as they started.
    """
    holders = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    raised = set[str]()
    for entry in lane.all_entries():
        site: Any = network.get_submodule(entry.site)
        if entry.layer is None or entry.site not in fresh or not site.center:
            continue
        layer: Any = network.get_submodule(entry.layer)
        site.center = 1.0 - (layer.weight.numel() // site.shift.shape[-1]) ** -COMMON
        weight = layer._parameters.get("weight")
        if site.center < 1 and EVERY and entry.layer not in raised and weight is not None and holders[id(weight)] == 1:
            raised.add(entry.layer)
            form, _ = site_operands(lane.arguments(network, entry))
            rows = to_rows(weight, form)
            numbers = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device).view(*rows.shape[:2], 1)
            more = rows.mean(-1, keepdim=True) * (1.0 / (1.0 - site.center) - 1.0)
            weight.copy_(from_rows(torch.where(numbers % EVERY == 0, rows + more, rows), weight, form))
