"""The contenders: the networks that one BatchNorm network becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from normprop.conversion.calibration import calibrate
from normprop.errors import NormPropError
from normprop.lab.cost.replacement import with_layer, without_batchnorm
from normprop.lab.names import unknown
from normprop.lab.networks.normalizers import NORMALIZERS, normalizer, realize

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Contender:
    """One of the networks.

    Attributes:
        name: Its name for `--against`.
        title: Its name in tables and figures.
        build: Makes the network to measure from the BatchNorm network and the shape of a sample.
    """

    name: str
    title: str
    build: Callable[[nn.Module, Shape], nn.Module]


def _converted(name: str) -> Callable[[nn.Module, Shape], nn.Module]:
    return lambda network, shape: realize(network, normalizer(name), shape)


def _calibrated(network: nn.Module, shape: Shape) -> nn.Module:
    """Directions of random samples: the cost depends on their number alone."""
    return calibrate(realize(network, normalizer("normprop"), shape), torch.randn(32, *shape))


def _normalized(name: str) -> Callable[[nn.Module, Shape], nn.Module]:
    return lambda network, _: with_layer(network, NORMALIZERS[name].layer)


def _plain(network: nn.Module, shape: Shape) -> nn.Module:
    return without_batchnorm(network, torch.zeros(1, *shape))


CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        Contender("normprop", "NormProp", _converted("normprop")),
        Contender("calibrated", "NormProp, calibrated", _calibrated),
        Contender("paper", "NormProp, the paper's form", _converted("paper")),
        Contender("plain", "no normaliser", _plain),
        Contender("batch", "BatchNorm", lambda network, _: network),
        Contender("group", "GroupNorm", _normalized("group")),
        Contender("layer", "LayerNorm", _normalized("layer")),
    )
}
SUBJECT = "normprop"


def rivals(names: list[str]) -> list[str]:
    """The names of NormProp's rivals, each once.

    Raises:
        NormPropError: for an unknown name, with the nearest ones; for no name at all.

    Example:
        >>> rivals(["plain", "batch", "plain"])
        ['plain', 'batch']
    """
    known = [name for name in CONTENDERS if name != SUBJECT]
    for name in names:
        if name not in known:
            raise unknown("contender", name, known)
    if not names:
        raise NormPropError("Nothing to compare with.\nUse --against plain batch, for example.")
    return list(dict.fromkeys(names))
