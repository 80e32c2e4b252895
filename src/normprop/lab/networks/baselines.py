"""The layers of other normalisers, from torch and timm, with one signature.

A layer is made for a number of channels and a number of spatial dimensions (0 for vectors, 2 for images). timm is imported
where it is needed, because torch's normalisers work without it.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# 1/std of the ReLU of a standard normal, 1/√(½(1 − 1/π)) (Arpit et al. 2016, remark 1; Brock et al. 2021, table 1).
_RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))


def batch(channels: int, dims: int) -> nn.Module:
    """Batch normalisation (Ioffe & Szegedy 2015)."""
    return nn.BatchNorm2d(channels) if dims else nn.BatchNorm1d(channels)


class FrozenBatchNorm(_BatchNorm):
    """Batch normalisation with the statistics of one batch, given to `measure_once`; γ and β are trained."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=1.0)
        self.training = False

    def _check_input_dim(self, input: Tensor) -> None:
        """Allow any number of spatial dimensions."""

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  torch's signature
        """Stay in evaluation mode, whatever mode the network is in."""
        return super().train(False)


def frozen(channels: int, _dims: int) -> nn.Module:
    """Batch normalisation with frozen statistics."""
    return FrozenBatchNorm(channels)


@torch.no_grad()
def measure_once(network: nn.Module, x: Tensor) -> None:
    """Set the statistics of every `FrozenBatchNorm` to those of the batch `x` on its way through the network.

    Example:
        >>> net = nn.Sequential(FrozenBatchNorm(1)).train()
        >>> measure_once(net, torch.tensor([[1.0], [3.0]]))
        >>> net(torch.tensor([[2.0]])).item()
        0.0
    """
    layers = [module for module in network.modules() if isinstance(module, FrozenBatchNorm)]
    if not layers:
        return
    for layer in layers:
        layer.training = True
    network(x)
    for layer in layers:
        layer.training = False


def group(channels: int, _dims: int) -> nn.Module:
    """Group normalisation (Wu & He 2018)."""
    return nn.GroupNorm(_groups(channels), channels)


def _groups(channels: int) -> int:
    """At most 32 equal groups of at least two channels: one alone would be instance normalisation."""
    return max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels >= 2 * g))


def layer(channels: int, _dims: int) -> nn.Module:
    """Layer normalisation over channels and positions (Ba et al. 2016)."""
    return nn.GroupNorm(1, channels)


def instance(channels: int, _dims: int) -> nn.Module:
    """Instance normalisation with γ and β (Ulyanov et al. 2016)."""
    return nn.InstanceNorm2d(channels, affine=True)


def nothing(_channels: int, _dims: int) -> nn.Module:
    """No layer at all."""
    return nn.Identity()


def zero_gain(channels: int, _dims: int) -> nn.Module:
    """A gain per channel that starts at 0, so that the residual branch it ends is empty at first (De & Smith 2020)."""
    from timm.layers.layer_scale import LayerScale2d

    scale: nn.Module = LayerScale2d(channels, init_values=0.0)
    return scale


def filter_response(channels: int, _dims: int) -> nn.Module:
    """Filter response normalisation without its activation (Singh & Krishnan 2020)."""
    from timm.layers.filter_response_norm import FilterResponseNormTlu2d

    norm: nn.Module = FilterResponseNormTlu2d(channels, apply_act=False)
    return norm


def filter_response_act(channels: int, _dims: int) -> nn.Module:
    """Filter response normalisation and its thresholded linear unit max(y, τ), τ learned."""
    from timm.layers.filter_response_norm import FilterResponseNormTlu2d

    norm: nn.Module = FilterResponseNormTlu2d(channels)
    return norm


def evonorm_affine(channels: int, _dims: int) -> nn.Module:
    """γ and β alone: EvoNorm-S0 without activation, for the end of a residual branch."""
    from timm.layers.evo_norm import EvoNorm2dS0

    norm: nn.Module = EvoNorm2dS0(channels, groups=_groups(channels), apply_act=False)
    return norm


def evonorm_act(channels: int, _dims: int) -> nn.Module:
    """EvoNorm-S0 (Liu et al. 2020): x·sigmoid(vx) over the group's standard deviation, then γ and β."""
    from timm.layers.evo_norm import EvoNorm2dS0

    norm: nn.Module = EvoNorm2dS0(channels, groups=_groups(channels))
    return norm


def convolution(inside: int, outside: int, size: int, stride: int, bias: bool) -> nn.Conv2d:
    """torch's convolution, padded so that stride 1 keeps the size of the image."""
    return nn.Conv2d(inside, outside, size, stride, size // 2, bias=bias)


def standardized_convolution(inside: int, outside: int, size: int, stride: int, bias: bool) -> nn.Conv2d:
    """Weight standardisation (Qiao et al. 2019): every filter has mean 0 and variance 1."""
    from timm.layers.std_conv import StdConv2d

    conv: nn.Conv2d = StdConv2d(inside, outside, size, stride, size // 2, bias=bias)
    return conv


def scaled_convolution(inside: int, outside: int, size: int, stride: int, bias: bool) -> nn.Conv2d:
    """Scaled weight standardisation (Brock et al. 2021a), which keeps the variance at 1 after a ReLU."""
    from timm.layers.std_conv import ScaledStdConv2d

    conv: nn.Conv2d = ScaledStdConv2d(inside, outside, size, stride, size // 2, bias=bias, gamma=_RELU_GAIN)
    return conv
