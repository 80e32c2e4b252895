"""Residual networks for small images, with any normaliser."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from normprop.lab.networks.normalizers import Normalizer

# Scale of a branch of NF-ResNets (Brock et al. 2021).
_ALPHA = 0.2


class Block(nn.Module):
    """Two 3×3 convolutions beside a skip, which is a 1×1 convolution where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int, norm: Normalizer) -> None:
        super().__init__()
        self.conv1 = norm.convolution(inside, outside, 3, stride)
        self.norm1, self.act1 = norm.hidden(outside, 2)
        self.conv2 = norm.convolution(outside, outside, 3)
        self.norm2 = norm.branch_end(outside)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.skip = nn.Sequential(norm.convolution(inside, outside, 1, stride), norm.layer(outside, 2))

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the sum of branch and skip."""
        y = self.act1(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ScaledBlock(nn.Module):
    """The block of NF-ResNets (Brock et al. 2021, section 3): x + α f(x/β), ReLU before each convolution of f.

    `beta` is the standard deviation of x at initialisation; α = 0.2. Where the shape changes, the skip is a 1×1
    convolution of the ReLU of x/β.
    """

    def __init__(self, inside: int, outside: int, stride: int, norm: Normalizer, beta: float) -> None:
        super().__init__()
        self.conv1 = norm.convolution(inside, outside, 3, stride)
        self.conv2 = norm.convolution(outside, outside, 3)
        self.skip = norm.convolution(inside, outside, 1, stride) if stride != 1 or inside != outside else None
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        """Sum of scaled branch and skip."""
        y = F.relu(x) / self.beta
        branch: Tensor = self.conv2(F.relu(self.conv1(y)))
        return _ALPHA * branch + (self.skip(y) if self.skip else x)


class ResNet(nn.Module):
    """A 3×3 convolution, stages of blocks, all but the first of which halve the image, average pooling, a linear layer.

    He et al. 2016, section 4.2, with three stages of n blocks: depth 6n + 2.

    Args:
        blocks: Number of blocks per stage.
        widths: Channels of each stage.
        channels: Channels of the images.
        classes: Number of outputs.
        norm: Its normaliser.
    """

    def __init__(self, blocks: int, widths: tuple[int, ...], channels: int, classes: int, norm: Normalizer) -> None:
        super().__init__()
        self.scaled = norm.branches == "scaled"
        self.conv = norm.convolution(channels, widths[0], 3)
        self.norm, self.act = (nn.Identity(), nn.Identity()) if self.scaled else norm.hidden(widths[0], 2)
        stages, inside, var = [], widths[0], 1.0
        for stage, outside in enumerate(widths):
            chain: list[nn.Module] = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                if self.scaled:
                    chain.append(ScaledBlock(inside, outside, stride, norm, beta=math.sqrt(var)))
                    var = _ALPHA**2 + (var if inside == outside else 1.0)  # a convolution on the skip starts anew
                else:
                    chain.append(Block(inside, outside, stride, norm))
                inside = outside
            stages.append(nn.Sequential(*chain))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `(batch, classes)` of images `(batch, channels, height, width)`."""
        x = self.stages(self.act(self.norm(self.conv(x))))
        if self.scaled:
            x = F.relu(x)
        return self.fc(self.pool(x).flatten(1))  # type: ignore[no-any-return]  # typed as Any upstream
