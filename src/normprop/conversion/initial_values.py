"""Whether γ and β are still those that a fresh network was converted with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Sums of one vector by different devices, or after a detour through another dtype of the same width.
_ROUNDING = 1e-6

Sums = tuple[float, float]


def initial_values(root: nn.Module, sites: Iterable[str]) -> dict[str, Sums]:
    """What tells γ and β of every site from others: sums of them, each number with a weight of its own.

    Args:
        root: the network.
        sites: paths.
    """
    return {path: _sums(root.get_submodule(path)) for path in sites}


def are_initial(site: nn.Module, path: str, known: Mapping[str, Sums]) -> bool:
    """Whether a site's γ and β have not changed since `initial_values` saw them; False if it never did.

    Args:
        site: the site.
        path: of it.
        known: what was seen.
    """
    if path not in known:
        return False
    return all(
        math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=_ROUNDING) for a, b in zip(_sums(site), known[path], strict=True)
    )


def _sums(site: Any) -> Sums:
    return _sum(site.weight), _sum(site.bias)


def _sum(values: Tensor | None) -> float:
    if values is None or values.is_meta:
        return 0.0
    return float(values.detach().cpu().double().flatten() @ torch.linspace(1.0, 2.0, values.numel(), dtype=torch.float64))
