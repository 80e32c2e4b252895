"""A network with another normaliser, or none, in place of its BatchNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from normprop.errors import NormPropError

_LAYERS = (_ConvNd, nn.Linear)


def without_batchnorm(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy without BatchNorm, in which a layer before one has a bias.

    A BatchNorm that follows anything but a convolution or a linear layer is left out without a replacement, so that the
    network consists of layers, biases and activations. An activation inside a BatchNorm module stays.

    Args:
        model: A network with BatchNorm; it is not changed.
        example: An input, which shows what follows what.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> plain = without_batchnorm(net, torch.randn(1, 3, 8, 8))
        >>> plain[0].bias.shape, plain[1]
        (torch.Size([8]), Identity())
    """
    network = copy.deepcopy(model)
    for layer, norm in _followed(network, example):
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(norm.num_features))
    return _replaced(network, lambda _: nn.Identity())


def with_layer(model: nn.Module, layer: Callable[[int, int], nn.Module]) -> nn.Module:
    """A copy with another normaliser in place of each BatchNorm; a bias that a layer has stays.

    Args:
        model: A network with BatchNorm; it is not changed.
        layer: Makes a module for a number of channels and of spatial dimensions (0 for vectors), as in `Normalizer`.
    """
    return _replaced(copy.deepcopy(model), lambda norm: layer(norm.num_features, _dims(norm)))


def check_has_batchnorm(model: nn.Module, name: str) -> None:
    """Check that a network has a BatchNorm to replace.

    Raises:
        NormPropError: if it has none.
    """
    if not any(isinstance(m, _NormBase) for m in model.modules()):
        raise NormPropError(f"{name} has no BatchNorm that could be replaced.\nChoose a network with BatchNorm.")


def _dims(norm: _NormBase) -> int:
    return 0 if isinstance(norm, nn.BatchNorm1d) else 2


def _replaced(network: nn.Module, new: Callable[[_NormBase], nn.Module]) -> nn.Module:
    for path, module in list(network.named_modules()):
        if isinstance(module, _NormBase):
            inner = [child for child in module.children() if not isinstance(child, nn.Identity)]  # a norm-act module's
            replacement = nn.Sequential(new(module), *inner) if inner else new(module)
            network.set_submodule(path, replacement)
    return network


@torch.no_grad()
def _followed(network: nn.Module, example: Tensor) -> list[tuple[Any, _NormBase]]:
    """Each layer whose output is what a BatchNorm normalises, with that BatchNorm."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # keeps the outputs, whose identities could be used again otherwise
    pairs: list[tuple[Any, _NormBase]] = []

    def remember(module: nn.Module, _: Any, output: Tensor) -> None:
        made[id(output)] = (module, output)

    def look_up(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(norm, _NormBase) and id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], norm))

    hooks = [m.register_forward_hook(remember) for m in network.modules() if isinstance(m, _LAYERS)]
    hooks += [m.register_forward_pre_hook(look_up) for m in network.modules() if isinstance(m, _NormBase)]
    training = network.training
    network.eval()(example)
    network.train(training)
    for hook in hooks:
        hook.remove()
    return pairs
