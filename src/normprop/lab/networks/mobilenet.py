"""A MobileNetV3 for small images, for `--model normprop.lab.networks.mobilenet:mobilenet`."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

# Kernel, expanded and outgoing channels, squeeze-and-excitation, activation (ReLU or hardswish) and stride of each block.
_BLOCKS = (
    (3, 16, 16, True, "RE", 1),
    (3, 72, 24, False, "RE", 2),
    (3, 88, 24, False, "RE", 1),
    (5, 96, 40, True, "HS", 2),
    (5, 240, 40, True, "HS", 1),
    (5, 120, 48, True, "HS", 1),
    (5, 288, 96, True, "HS", 2),
)
_STEM, _LAST = 16, 256


def mobilenet(*, channels: int, classes: int) -> nn.Module:
    """Torchvision's MobileNetV3 (Howard et al. 2019) with seven blocks, and with a stem of stride 1 for small images.

    Its BatchNorms have torch's own momentum, as short runs need it.

    Example:
        >>> import torch
        >>> net = mobilenet(channels=3, classes=10).eval()
        >>> net(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3  # slow to import

    settings, inside = [], _STEM
    for kernel, expanded, outside, squeeze, activation, stride in _BLOCKS:
        settings.append(InvertedResidualConfig(inside, kernel, expanded, outside, squeeze, activation, stride, 1, 1.0))
        inside = outside
    network: Any = MobileNetV3(settings, _LAST, classes, norm_layer=nn.BatchNorm2d)
    stem = network.features[0]
    stem[0] = nn.Conv2d(channels, _STEM, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem[0].weight, mode="fan_out")  # as the others
    return cast(nn.Module, network)
