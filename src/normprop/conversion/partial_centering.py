"""How much of their mean the filters of a fresh network keep: in the course of training, and at its start."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from normprop.conversion.entry import Entry
from normprop.conversion.lane import Lane
from normprop.sites.rows import from_rows, to_rows
from normprop.sites.site import site_operands

# Power of a filter's number of inputs that is left of its mean. ½ follows from what is said at `center_partly`.
COMMON = 0.5
# Which filters start with the mean that they were given: every second one. 0 for none.
EVERY = 2


@torch.no_grad()
def center_partly(network: nn.Module, lane: Lane, fresh: Collection[str]) -> None:
    """Leave filters before fresh sites n^-½ of the mean that `convert` takes: what a filter's n inputs have in common varies
    up to n times as much as anything else, and moves an output no more than that then (derived).

    The mean of every second filter is multiplied by √n, so that it starts as it was. Its share of the filter is learned as
    slowly as that of the others. Weights that anything but fresh sites reads stay.

    Args:
        network: a converted network; its weights and its sites' `center` are changed.
        lane: its lane.
        fresh: paths of sites as they started.
    """
    readers: dict[int, list[Entry]] = {}
    for entry in lane.all_entries():
        if entry.layer is None:
            continue
        site: Any = network.get_submodule(entry.site)
        weight: Any = network.get_submodule(entry.layer).weight
        readers.setdefault(id(weight), []).append(entry)
        if entry.site in fresh and site.center:
            site.center = 1.0 - (weight.numel() // site.shift.shape[-1]) ** -COMMON
    named = dict(network.named_parameters())
    for filters in (named.get(known["weight"]) for known in lane.filters) if EVERY else ():
        entries = readers.get(id(filters), [])
        if filters is not None and entries and all(entry.site in fresh for entry in entries):
            _raise_means(network, filters, entries[0])


def _raise_means(network: nn.Module, weight: Tensor, entry: Entry) -> None:
    """Multiply means of filters by what centring divides them by."""
    site: Any = network.get_submodule(entry.site)
    if not 0 < site.center < 1:
        return
    form, _ = site_operands((weight, site, None, entry.options))
    rows = to_rows(weight, form)
    numbers = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device).view(*rows.shape[:2], 1)
    more = rows.mean(-1, keepdim=True) * (1.0 / (1.0 - site.center) - 1.0)
    weight.copy_(from_rows(torch.where(numbers % EVERY == 0, rows + more, rows), weight, form))
