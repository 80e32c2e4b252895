"""Residual networks for small images, with any normaliser."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from normprop.experiments.normalizers import Normalizer


class Block(nn.Module):
    """Two 3×3 convolutions beside a skip, which is a 1×1 convolution where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int, norm: Normalizer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=norm.bias)
        self.norm1 = norm.layer(outside, 2)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=norm.bias)
        self.norm2 = norm.layer(outside, 2)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.skip = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=norm.bias), norm.layer(outside, 2))

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the sum of branch and skip."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ResNet(nn.Module):
    """A 3×3 convolution, stages of blocks that halve the image but for the first, global average pooling, a linear layer.

    He et al. 2016, section 4.2, with three stages of n blocks: depth 6n + 2.

    Args:
        blocks: Blocks in each stage.
        widths: Channels of each stage.
        channels: Channels of the images.
        classes: Number of outputs.
        norm: What normalises it.
    """

    def __init__(self, blocks: int, widths: tuple[int, ...], channels: int, classes: int, norm: Normalizer) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=norm.bias)
        self.norm = norm.layer(widths[0], 2)
        stages, inside = [], widths[0]
        for stage, outside in enumerate(widths):
            chain = []
            for block in range(blocks):
                chain.append(Block(inside, outside, 2 if stage and not block else 1, norm))
                inside = outside
            stages.append(nn.Sequential(*chain))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `(batch, classes)` of images `(batch, channels, height, width)`."""
        x = self.stages(F.relu(self.norm(self.conv(x))))
        return self.fc(self.pool(x).flatten(1))  # type: ignore[no-any-return]  # typed as Any upstream
