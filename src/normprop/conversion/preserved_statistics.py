"""Constants of each site from the statistics that its BatchNorm standardised by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normprop.conversion.entry import Key
from normprop.conversion.lane import Lane
from normprop.conversion.site_constants import Statistics, own_output, set_constants
from normprop.sites.site import site_statistics


@torch.no_grad()
def preserve_(
    root: nn.Module, lane: Lane, statistics: Mapping[Key, Statistics], biases: Mapping[str, Tensor | None]
) -> None:
    """Set every site's constants so that it standardises by given statistics: d = (rm − E)/√V, k = (rv + ε)/V.

    A site that had no BatchNorm in its place gets γ = √V and β = E + b instead, so that it gives the layer's own output;
    later moments follow.

    Args:
        root: a network with its sites in place; changed.
        lane: its lane.
        statistics: mean, and variance plus ε, of a layer's output without its bias, by site and call.
        biases: of the layers before sites that had no BatchNorm in their place, by path of the site.
    """
    for entry in lane.all_entries():
        site: Any = root.get_submodule(entry.site)
        _, mean, var = site_statistics(lane.arguments(root, entry))
        if entry.site in biases:
            target = own_output(site, biases[entry.site], mean, var, first=entry.call == 0)
        elif entry.key in statistics:
            target = statistics[entry.key]
        else:
            continue
        set_constants(site, entry.call, target, mean, var)
