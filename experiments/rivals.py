"""Other normalisers in a network that was built with BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mabn import Centred, MovingAverageNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normprop
from normprop.lab.networks import baselines

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "frozen": baselines.frozen,
    "group": baselines.group,
    "layer": baselines.layer,
    "ws": baselines.group,
    "mabn": lambda channels, _dims: MovingAverageNorm(channels),
    "none": baselines.nothing,
}
NAMES = ("normprop", "batch", *LAYERS)
CONVERTED = ("normprop", "centred", "uncentred")


def with_normalizer(network: nn.Module, name: str, samples: Tensor) -> nn.Module:
    """A fresh BatchNorm network with another normaliser, or converted.

    Args:
        network: is changed.
        name: of `NAMES` or `CONVERTED`; ws is weight standardisation before GroupNorm, mabn moving average batch
            normalisation.
        samples: on which the statistics of frozen BatchNorm are measured.
    """
    if name in CONVERTED:
        return normprop.convert(network, example=samples[:2], **conversion(name)[0])
    if name == "batch":
        return network
    for module in list(network.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(module, key, LAYERS[name](child.num_features, 2))
            elif isinstance(child, nn.Conv2d) and child.bias is None:
                if name == "none":
                    child.bias = nn.Parameter(torch.zeros(child.out_channels))
                if name in PARAMETRIZATIONS:
                    nn.utils.parametrize.register_parametrization(child, "weight", PARAMETRIZATIONS[name]())
    baselines.measure_once(network, samples)
    return network


class Standardised(nn.Module):
    """Weight standardisation (Qiao et al. 2019): every filter has mean 0 and variance 1, here times 1/√fan-in."""

    def forward(self, weight: Tensor) -> Tensor:
        """The filters of a layer."""
        flat = weight.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        size = centred.square().sum(1, keepdim=True) + 1e-10
        return (centred * size.rsqrt()).view_as(weight)


# What is done to the filters before a normaliser.
PARAMETRIZATIONS: dict[str, Callable[[], nn.Module]] = {"ws": Standardised, "mabn": Centred}


def conversion(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `convert` and of `keep_calibrated`: normprop has the defaults.

    centred: filters lose all of their means, not all but 1/√n. uncentred: they keep them, and
    what inputs have in common is counted nearly whole (`shrinkage`), as it has to be where nothing takes it away.
    """
    known = {"centred": ({}, {"center": False}), "uncentred": ({"center": False}, {"shrinkage": 0.1})}
    return known.get(name, ({}, {}))
