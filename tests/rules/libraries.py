"""Layers of timm and torchvision that have a rule."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import (
    AvgPool2dSame,
    BatchNormAct2d,
    Conv2dSame,
    DropBlock2d,
    DropPath,
    FrozenBatchNormAct2d,
    ScaledStdConv2d,
    StdConv2d,
)  # fmt: skip
from timm.layers.norm_act import SyncBatchNormAct
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models.maxxvit import window_partition, window_reverse
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from normprop.rules.pooling import WINDOW_CORRELATION
from tests.rules.case import Case, channel_moments

torch.manual_seed(0)
_GIVEN = channel_moments(3)
_WINDOW = {"correlation": WINDOW_CORRELATION}


def _described(norm: nn.Module) -> nn.Module:
    """With the input's statistics as the running ones, and an affine map that is not the identity."""
    norm = norm.double().eval()
    norm.running_mean.copy_(_GIVEN.mean)
    norm.running_var.copy_(_GIVEN.var - norm.eps)
    norm.weight.data.copy_(torch.tensor([0.5, 1.0, 1.5]))
    return norm


class Windows(nn.Module):
    """An image cut into windows and put together again."""

    def forward(self, x: Any) -> Any:
        return window_reverse(window_partition(x.permute(0, 2, 3, 1), [2, 2]), [2, 2], [4, 4])


CASES = {
    "Conv2dSame": Case(Conv2dSame(4, 3, 1, stride=2), [(4, 4, 4)]),
    "StdConv2d": Case(StdConv2d(4, 3, 3, padding=0), [(4, 4, 4)]),
    "ScaledStdConv2d": Case(ScaledStdConv2d(4, 3, 3, padding=0), [(4, 4, 4)]),
    "BatchNormAct2d": Case(_described(BatchNormAct2d(3)), [(3, 2, 2)]),
    "FrozenBatchNormAct2d": Case(_described(FrozenBatchNormAct2d(3, apply_act=False)), [(3, 2, 2)]),
    "FrozenBatchNorm2d": Case(_described(FrozenBatchNorm2d(3)), [(3, 2, 2)]),
    "SyncBatchNormAct": Case(_described(SyncBatchNormAct(3)), [(3, 2, 2)]),
    "window_reverse": Case(Windows(), [(3, 4, 4)], samples=4000),
    "AvgPool2dSame": Case(AvgPool2dSame(2, 2), [(3, 4, 4)], **_WINDOW),
    "MaxPool2dSame": Case(MaxPool2dSame(2, 2), [(3, 4, 4)], **_WINDOW),
    "DropPath": Case(DropPath(0.3), [(3, 2)], train=True),
    "DropPath without rescaling": Case(DropPath(0.3, scale_by_keep=False), [(3, 2)], train=True),
    "DropBlock2d": Case(DropBlock2d(0.1, 3), [(3, 8, 8)], train=True, exact=False, tolerance=0.15, samples=4000),
}
