"""The networks of the experiments by name: plain torch.nn, with the normaliser as a parameter."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from normprop.errors import NormPropError
from normprop.lab.names import unknown
from normprop.lab.networks.external import build_external
from normprop.lab.networks.normalizers import Normalizer
from normprop.lab.networks.resnet import Block, ResNet

_NAMES = ("nin", "mlp", "plain12", "resnet8", "resnet18", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


def build(name: str, *, shape: tuple[int, ...], classes: int, norm: Normalizer, width: float = 1.0) -> nn.Module:
    """A freshly initialised network with `norm` before every hidden activation; see `realize` for the rest.

    Args:
        name: `nin` (the network of Arpit et al. 2016), `mlp`, `plainN` (N layers, no skips), `resnetN` (N = 6n + 2),
            `resnet18` (that of ImageNet, for small images: a 3×3 stem of stride 1, no pooling), or `torchvision:NAME`,
            `timm:NAME`, `MODULE:FUNCTION` (called with `channels=` and `classes=`).
        shape: Shape of a sample, `(channels, height, width)` or `(features,)`.
        classes: Number of outputs.
        norm: Its normaliser.
        width: Factor on the number of channels of the built-in networks.

    Raises:
        NormPropError: for an unknown name, samples that don't suit the network, or a network from elsewhere with a
            normaliser that only built-in networks can have.

    Example:
        >>> from normprop.lab.networks.normalizers import normalizer
        >>> net = build("nin", shape=(3, 32, 32), classes=10, norm=normalizer("batch"), width=0.25)
        >>> net[0].weight.shape
        torch.Size([48, 3, 5, 5])
    """
    if width <= 0:
        raise NormPropError(f"Width {width} leaves no channels.\nUse a factor above 0; 1 is the full network.")
    if ":" in name:
        if width != 1.0:
            raise NormPropError(f"{name} has its own width.\nLeave out --width.")
        return build_external(name, shape=shape, classes=classes, norm=norm)
    if norm.images_only and (len(shape) != 3 or name == "mlp"):
        raise NormPropError(
            f"--norm {norm.name} needs images: a vector has no positions.\nUse --norm layer, or --model nin."
        )
    family = re.fullmatch(r"(nin|mlp|plain|resnet)(\d*)", name)
    depth = int(family[2]) if family and family[2] else 0
    if family and family[1] == "mlp" and not depth:
        return initialized(_mlp(shape, classes, norm, width), norm)
    if family and len(shape) != 3:
        raise NormPropError(f"{name} needs images, not samples of shape {shape}.\nUse --model mlp.")
    if family and family[1] == "nin" and not depth:
        return initialized(_nin(shape[0], classes, norm, width), norm)
    if family and family[1] == "plain" and depth >= 4:
        return initialized(_plain(depth, shape[0], classes, norm, width), norm)
    if name == "resnet18":
        return initialized(ResNet(2, tuple(_scaled(c, width) for c in (64, 128, 256, 512)), shape[0], classes, norm), norm)
    if family and family[1] == "resnet" and depth >= 8 and (depth - 2) % 6 == 0:
        widths = tuple(_scaled(c, width) for c in (16, 32, 64))
        return initialized(ResNet((depth - 2) // 6, widths, shape[0], classes, norm), norm)
    raise unknown("model", name, _NAMES, "torchvision:NAME, timm:NAME and MODULE:FUNCTION work too.")


def initialized(network: nn.Module, norm: Normalizer) -> nn.Module:
    """He's initialisation for every layer before a ReLU, torch's own for the last one; biases at zero."""
    linear = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for module in linear[:-1]:
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for module in linear:
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if norm.weight_norm:
        _split_weights(network, linear[:-1])
    return network


@torch.no_grad()
def _split_weights(network: nn.Module, hidden: Sequence[nn.Module]) -> None:
    """Weight normalisation with lengths √(s·fan_in/fan_out) that keep the norm of the signal (Arpit et al. 2019).

    s is 2 before a ReLU, 1 on a skip and 1/B at the end of a residual branch, where B blocks follow each other.
    """
    share: dict[nn.Module, float] = dict.fromkeys(hidden, 2.0)
    for stage in network.stages.children() if isinstance(network, ResNet) else ():
        blocks = [block for block in stage.children() if isinstance(block, Block)]
        for block in blocks:
            share[block.conv2] = 1 / len(blocks)
            share.update((module, 1.0) for module in block.skip.modules() if module in share)
    for module, s in share.items():
        outside, inside = module.get_parameter("weight").shape[:2]
        weight_norm(module)
        module.get_parameter("parametrizations.weight.original0").fill_(math.sqrt(s * inside / outside))


def _scaled(channels: int, width: float) -> int:
    return max(2, round(channels * width))


def _conv(inside: int, outside: int, size: int, norm: Normalizer, stride: int = 1) -> list[nn.Module]:
    return [norm.convolution(inside, outside, size, stride), *norm.hidden(outside, 2)]


def _nin(channels: int, classes: int, norm: Normalizer, width: float) -> nn.Module:
    """The network of Arpit et al. (2016), section 5; the last pooling spans the remaining image, 8×8 for CIFAR."""
    c192, c160, c96 = (_scaled(c, width) for c in (192, 160, 96))
    return nn.Sequential(
        *_conv(channels, c192, 5, norm),
        *_conv(c192, c160, 1, norm),
        nn.MaxPool2d(3, 2, 1),
        *_conv(c160, c96, 1, norm),
        *_conv(c96, c192, 5, norm),
        *_conv(c192, c192, 1, norm),
        nn.AvgPool2d(3, 2, 1),
        *_conv(c192, c192, 1, norm),
        *_conv(c192, c192, 5, norm),
        *_conv(c192, c192, 1, norm),
        nn.Conv2d(c192, classes, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _mlp(shape: tuple[int, ...], classes: int, norm: Normalizer, width: float) -> nn.Module:
    """Three hidden layers of 256 units."""
    features = 1
    for size in shape:
        features *= size
    sizes = [features, *[_scaled(256, width)] * 3]
    hidden = [
        layer
        for inside, outside in pairwise(sizes)
        for layer in (nn.Linear(inside, outside, bias=norm.bias), *norm.hidden(outside, 0))
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))


def _plain(depth: int, channels: int, classes: int, norm: Normalizer, width: float) -> nn.Module:
    """`depth` − 1 convolutions of 3×3 in three stages of 32, 64 and 128 channels without skips, then a linear layer."""
    convs, inside, last_stage = [], channels, 0
    for layer in range(depth - 1):
        stage = layer * 3 // (depth - 1)
        outside = _scaled(32 * 2**stage, width)
        convs += _conv(inside, outside, 3, norm, stride=1 + (stage != last_stage))
        inside, last_stage = outside, stage
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))
