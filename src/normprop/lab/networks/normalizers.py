"""The normalisers that a network can be built with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

import normprop
from normprop.data import InputStats
from normprop.lab.names import unknown
from normprop.lab.networks import baselines

Layer = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class Normalizer:
    """One way to normalise or to do without: the layers between linear operations, and the linear operations.

    A layer is made for a number of channels and a number of spatial dimensions (0 for vectors, 2 for images).

    Attributes:
        name: Its name for `--norm`.
        layer: The layer between a linear operation and its ReLU.
        act: Layer and activation where they are one; None for `layer`, then ReLU.
        ending: In place of `layer` at the end of a residual branch; None for `layer`.
        conv: Makes a convolution from (channels in, channels out, size, stride, bias).
        bias: Whether the linear operation before the layer needs a bias.
        branches: `scaled` for the residual blocks of NF-ResNets, `plain` for those of He et al. 2016.
        weight_norm: Whether weights are split into length and direction.
        method: The method by which `normprop.convert` converts the network built with `layer`; None if it doesn't.
        rate: Default learning rate at batch size 64.
        clip: Default adaptive gradient clipping at batch size 64; 0 for none.
        calibrate: Default number of training samples from which its constants are set; 0 if it has none.
        smallest_batch: The smallest batch size that it can train at.
        images_only: Whether it needs spatial dimensions.
    """

    name: str
    layer: Layer
    act: Layer | None = None
    ending: Layer | None = None
    conv: Callable[[int, int, int, int, bool], nn.Conv2d] = baselines.convolution
    bias: bool = False
    branches: Literal["plain", "scaled"] = "plain"
    weight_norm: bool = False
    method: Literal["exact", "paper"] | None = None
    rate: float = 0.1
    clip: float = 0.0
    calibrate: int = 0
    smallest_batch: int = 1
    images_only: bool = False

    @property
    def fits_any_network(self) -> bool:
        """Whether it can normalise a network that was built elsewhere with BatchNorm."""
        return self.method is not None or self.layer is baselines.batch

    def hidden(self, channels: int, dims: int) -> tuple[nn.Module, nn.Module]:
        """Normaliser and activation after a hidden linear operation."""
        if self.act:
            return self.act(channels, dims), nn.Identity()
        return self.layer(channels, dims), nn.ReLU()

    def branch_end(self, channels: int) -> nn.Module:
        """The last layer of a residual branch of images, before the branch joins its skip."""
        return (self.ending or self.layer)(channels, 2)

    def convolution(self, inside: int, outside: int, size: int, stride: int = 1) -> nn.Conv2d:
        """A hidden convolution, padded so that stride 1 keeps the size of the image."""
        return self.conv(inside, outside, size, stride, self.bias)


NORMALIZERS: dict[str, Normalizer] = {
    n.name: n
    for n in (
        Normalizer("normprop", baselines.batch, method="exact", clip=0.05, calibrate=256),
        Normalizer("paper", baselines.batch, method="paper", clip=0.05),
        Normalizer("batch", baselines.batch, smallest_batch=2),
        Normalizer("frozen", baselines.frozen),
        Normalizer("group", baselines.group),
        Normalizer("layer", baselines.layer),
        Normalizer("instance", baselines.instance, images_only=True),
        Normalizer("ws", baselines.group, conv=baselines.standardized_convolution, images_only=True),
        Normalizer("frn", baselines.filter_response, act=baselines.filter_response_act, images_only=True),
        Normalizer("evonorm-s0", baselines.evonorm_affine, act=baselines.evonorm_act, images_only=True),
        Normalizer(
            "nf",
            baselines.nothing,
            conv=baselines.scaled_convolution,
            bias=True,
            branches="scaled",
            clip=0.05,
            images_only=True,
        ),
        Normalizer("weight", baselines.nothing, bias=True, weight_norm=True),
        Normalizer("none", baselines.nothing, bias=True, rate=0.02),
        Normalizer("none-zero", baselines.nothing, ending=baselines.zero_gain, bias=True, rate=0.02),
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
