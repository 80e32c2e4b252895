"""Filters that lie channels last, which CPUs and tensor cores convolve fastest; but not where gradients would be wrong."""

from __future__ import annotations

import torch
from torch import nn

# Channels that oneDNN keeps together with AVX-512; with AVX2 it is 8.
_BLOCK = 16


def overrunning(network: nn.Module) -> list[str]:
    """Names of the convolutions whose weight gradient writes past its memory on a CPU where images lie channels last.

    oneDNN (3.12, in torch 2.13 and 2.14) copies the pixels that a 1×1 convolution with a stride reads to memory of its
    own, in blocks of 16 channels with AVX-512 and of 8 with AVX2, and takes too little for fewer channels. Gradients
    become wrong, or the process crashes. A transposed convolution does so with its output. Convolutions that are called
    as functions aren't found.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(4, 32, 1, stride=2), nn.Conv2d(32, 8, 1, stride=2), nn.Conv2d(8, 8, 1))
        >>> overrunning(net)
        ['0']
    """
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
        and (layer.kernel_size, layer.groups) == ((1, 1), 1)
        and layer.stride != (1, 1)
        and (layer.out_channels if layer.transposed else layer.in_channels) < _BLOCK
        and any(parameter.is_cpu for parameter in layer.parameters())
    ]


def to_channels_last(network: nn.Module) -> nn.Module:
    """The network with its filters channels last, as it is where one of its convolutions is `overrunning`.

    One is enough: activations take the format of the filters they meet and hand it on. Images that lie channels last do
    so too; contiguous ones leave the choice to the filters, and cost the same.

    Example:
        >>> net = to_channels_last(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)))
        >>> net(torch.randn(2, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)
        True
        >>> net = to_channels_last(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1, stride=2)))
        >>> net(torch.randn(2, 3, 8, 8)).is_contiguous()
        True
    """
    return network if overrunning(network) else network.to(memory_format=torch.channels_last)
