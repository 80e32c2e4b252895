"""Networks whose residual branches are left out at random, for `--model drop_path:NAME` in this folder."""

from __future__ import annotations

from timm.layers import DropPath
from torch import nn

from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer
from normprop.lab.networks.resnet import Block

RATE = 0.1


def resnet8(*, channels: int, classes: int) -> nn.Module:
    """ResNet-8 with BatchNorm; each branch is dropped for each sample with probability `RATE`."""
    network = build("resnet8", shape=(channels, 32, 32), classes=classes, norm=normalizer("batch"))
    for block in [module for module in network.modules() if isinstance(module, Block)]:
        block.norm2 = nn.Sequential(block.norm2, DropPath(RATE))
    return network
