"""The normalisers a network can be built with, and how each is realised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

import normprop
from normprop.data import InputStats
from normprop.errors import NormPropError
from normprop.experiments.names import unknown


@dataclass(frozen=True)
class Normalizer:
    """One way to normalise: a layer between linear operation and activation, or a conversion of the BatchNorm network.

    Attributes:
        name: What `--norm` calls it.
        layer: From the number of channels and of spatial dimensions (0 for vectors, 2 for images) to a module.
        bias: Whether the linear operation before the layer needs a bias of its own.
        method: How `normprop.convert` is to rewrite the network built with `layer`; None leaves it.
        rate: Learning rate that suits it at batch size 64.
        clip: Adaptive gradient clipping that suits it at batch size 64; 0 for none.
        smallest_batch: What it can train at.
    """

    name: str
    layer: Callable[[int, int], nn.Module]
    bias: bool = False
    method: Literal["exact", "paper"] | None = None
    rate: float = 0.1
    clip: float = 0.0
    smallest_batch: int = 1

    @property
    def fits_any_network(self) -> bool:
        """Whether it can normalise a network that was built elsewhere with BatchNorm."""
        return self.method is not None or self.layer is _batch


def _batch(channels: int, dims: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if dims else nn.BatchNorm1d(channels)


def _group(channels: int, _dims: int) -> nn.Module:
    """At most 32 equal groups (Wu & He 2018) of at least two channels: one alone would be instance normalisation."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels >= 2 * g))
    return nn.GroupNorm(groups, channels)


def _layer(channels: int, _dims: int) -> nn.Module:
    return nn.GroupNorm(1, channels)


def _instance(channels: int, dims: int) -> nn.Module:
    if not dims:
        raise NormPropError("Instance normalisation needs images: a vector has one value per channel.\nUse --norm layer.")
    return nn.InstanceNorm2d(channels, affine=True)


def _none(_channels: int, _dims: int) -> nn.Module:
    return nn.Identity()


NORMALIZERS: dict[str, Normalizer] = {
    n.name: n
    for n in (
        Normalizer("normprop", _batch, method="exact", clip=0.05),
        Normalizer("paper", _batch, method="paper", clip=0.05),
        Normalizer("batch", _batch, smallest_batch=2),
        Normalizer("group", _group),
        Normalizer("layer", _layer),
        Normalizer("instance", _instance),
        Normalizer("none", _none, bias=True, rate=0.02),
    )
}


def normalizer(name: str) -> Normalizer:
    """The normaliser of that name.

    Raises:
        NormPropError: for an unknown name, with the nearest ones.

    Example:
        >>> normalizer("group").layer(48, 2).num_groups
        24
    """
    if name not in NORMALIZERS:
        raise unknown("normaliser", name, NORMALIZERS)
    return NORMALIZERS[name]


def realize(network: nn.Module, norm: Normalizer, shape: tuple[int, ...]) -> nn.Module:
    """The network built with `norm.layer`, converted for a standardised input of `shape` where `norm` asks for it."""
    if norm.method is None:
        return network
    converted: nn.Module = normprop.convert(network, InputStats.standard(*shape), method=norm.method)
    return converted
