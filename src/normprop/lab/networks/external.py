"""Networks from elsewhere: torchvision's, timm's and the user's own."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from normprop.errors import NormPropError
from normprop.lab.names import unknown
from normprop.lab.networks.normalizers import Normalizer


def build_external(name: str, *, shape: tuple[int, ...], classes: int, norm: Normalizer) -> nn.Module:
    """The untrained network that `torchvision:NAME`, `timm:NAME` or `MODULE:FUNCTION` names.

    `FUNCTION(channels=…, classes=…)` returns a module; `MODULE` is looked for in the current directory too.

    Raises:
        NormPropError: for an unknown name, or a normaliser that only built-in networks can have.
    """
    if not norm.fits_any_network:
        raise NormPropError(
            f"{name} is built elsewhere, with its own normaliser: {norm.name} can't be put into it.\n"
            "Use --norm normprop, paper or batch, or a built-in network such as resnet20."
        )
    source, _, rest = name.partition(":")
    if source == "torchvision":
        return _torchvision(rest, shape[0], classes)
    if source == "timm":
        return _timm(rest, shape[0], classes)
    return _function(source, rest, shape[0], classes)


def _torchvision(name: str, channels: int, classes: int) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise unknown("torchvision model", name, models.list_models(module=models))
    if channels != 3:
        raise NormPropError(
            f"torchvision's {name} takes 3 channels, the data has {channels}.\n"
            f"Use timm:{name}, which takes any number, or data in colour."
        )
    network: nn.Module = models.get_model(name, num_classes=classes)
    return network


def _timm(name: str, channels: int, classes: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    return network


def _function(module: str, function: str, channels: int, classes: int) -> nn.Module:
    if "" not in sys.path:
        sys.path.insert(0, "")  # an installed command, unlike `python -m`, doesn't look in the current directory
    try:
        build: Any = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise NormPropError(
            f"There is no {function!r} in a module {module!r}: {error}.\n"
            "MODULE:FUNCTION must be importable from the current directory; torchvision:NAME and timm:NAME work too."
        ) from error
    network = build(channels=channels, classes=classes)
    if not isinstance(network, nn.Module):
        raise NormPropError(
            f"{module}:{function} returned {type(network).__name__}, not a torch.nn.Module.\nReturn the network."
        )
    return network
