"""Which sites of a converted network are as they started."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from normprop.conversion.initial_values import are_initial
from normprop.conversion.lane import Lane


def fresh_sites(network: nn.Module, lane: Lane) -> tuple[list[str], list[str]]:
    """Sites as their network started, or as a new BatchNorm does: β zero, and γ of one value; and the others.

    Args:
        network: a converted network.
        lane: its lane.
    """
    fresh, trained = list[str](), list[str]()
    for path in dict.fromkeys(entry.site for entry in lane.all_entries()):
        site: Any = network.get_submodule(path)
        values: list[Tensor] = [t.detach() for t in (site.bias, site.weight) if t is not None]
        new = (site.bias is None or not bool(site.bias.any())) and all(bool((t == t.flatten()[:1]).all()) for t in values)
        new = new or are_initial(site, path, lane.initial)
        (fresh if new and site.bias is not None else trained).append(path)
    return fresh, trained
