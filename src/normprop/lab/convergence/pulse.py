"""What is measured in a network after each epoch beside its accuracy: drift, and γ."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normprop
from normprop.conversion.lane import lane_of
from normprop.sites.site import Site

# Significant digits that are kept.
_DIGITS = 5


@torch.no_grad()
def drift(network: nn.Module, x: Tensor) -> dict[str, float] | None:
    """How far standard deviations are from the predicted ones, in octaves, rms over channels (`Row.drift`).

    Args:
        network: After its input is standardised.
        x: Samples as it takes them, `(n, …)`.

    Returns:
        Root mean square and greatest over normalised layers; None for a network without predictions, as BatchNorm's.
    """
    if lane_of(network) is None:
        return None
    found = [row.drift for row in normprop.inspect(network, x) if row.operation == Site.__name__ and row.drift is not None]
    if not found or not all(map(math.isfinite, found)):
        return None
    rms = math.sqrt(sum(value * value for value in found) / len(found))
    return {"rms": _rounded(rms), "worst": _rounded(max(found))}


def gains(network: nn.Module) -> dict[str, float] | None:
    """|γ| over all channels of all normalisers: least, lower quartile, median, upper quartile, greatest; None without γ.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3))
        >>> gains(net)
        {'least': 1.0, 'lower': 1.0, 'median': 1.0, 'upper': 1.0, 'greatest': 1.0}
    """
    found = [
        module.weight.detach().abs().flatten().double().cpu()
        for module in network.modules()
        if isinstance(module, Site | _BatchNorm) and module.weight is not None
    ]
    if not found:
        return None
    gamma = torch.cat(found)
    if not bool(gamma.isfinite().all()):
        return None
    places: dict[str, float] = {"least": 0.0, "lower": 0.25, "median": 0.5, "upper": 0.75, "greatest": 1.0}
    return {name: _rounded(float(gamma.quantile(place))) for name, place in places.items()}


def pulse(network: nn.Module, x: Tensor) -> dict[str, Any]:
    """Both, for a row of JSON."""
    return {"drift": drift(network, x), "gamma": gains(network)}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
