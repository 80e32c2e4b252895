"""Whether γ and β are still those that a fresh network was converted with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Means of one vector by different devices, or after a detour through another dtype of the same width.
_ROUNDING = 1e-6

Means = tuple[float, float]


def initial_values(root: nn.Module, sites: Iterable[str]) -> dict[str, Means]:
    """What tells γ and β of every site from others: means of them, see `weighed`.

    Args:
        root: the network.
        sites: paths.
    """
    return {path: _means(root.get_submodule(path)) for path in sites}


def are_initial(site: nn.Module, path: str, known: Mapping[str, Means]) -> bool:
    """Whether a site's γ and β have not changed since `initial_values` saw them; False if it never did.

    Args:
        site: the site.
        path: of it.
        known: what was seen.
    """
    if path not in known:
        return False
    return all(
        math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=_ROUNDING) for a, b in zip(_means(site), known[path], strict=True)
    )


def _means(site: Any) -> Means:
    return _mean(site.weight), _mean(site.bias)


def _mean(values: Tensor | None) -> float:
    return 0.0 if values is None or values.is_meta else weighed(values)


def weighed(values: Tensor) -> float:
    """A mean of numbers in which each has a weight of its own, so that others in other places give another."""
    numbers = values.detach().cpu().double().flatten()
    weights = torch.linspace(1.0, 2.0, len(numbers), dtype=torch.float64)
    return float((numbers * weights).sum() / weights.sum())
