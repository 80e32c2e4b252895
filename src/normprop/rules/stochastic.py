"""Noise of training: dropout and drop-path, the identity in eval mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from normprop.channel_moments import Moments
from normprop.rules.table import rule


def _dropped(x: Moments, p: float, training: bool) -> Moments:
    """``x · mask / (1−p)``: the mean stays, ``Var = (v + p m²)/(1−p)`` (law of total variance; m² included)."""
    if not training or p == 0.0:
        return x
    if p >= 1.0:
        return x.scaled(0.0)
    return Moments(x.mean, (x.var + p * x.mean.square()) / (1.0 - p))


@rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, training_only=True)
def dropout(module: nn.Dropout, x: Moments) -> Moments:
    """``Var = (v + p m²)/(1−p)`` in training, whether elements or whole channels are dropped."""
    return _dropped(x, module.p, module.training)


@rule(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, training_only=True)
def functional_dropout(x: Moments, p: float = 0.5, training: bool = True, inplace: bool = False) -> Moments:
    """As `dropout`."""
    return _dropped(x, p, training)


@rule("torchvision.ops.stochastic_depth.stochastic_depth", training_only=True)
def stochastic_depth(x: Moments, p: float, mode: str, training: bool = True) -> Moments:
    """As `dropout`, for whole samples."""
    return _dropped(x, p, training)


@rule("torchvision.ops.stochastic_depth.StochasticDepth", training_only=True)
def stochastic_depth_module(module: nn.Module, x: Moments) -> Moments:
    """As `dropout`, for whole samples."""
    return _dropped(x, float(module.p), module.training)  # type: ignore[arg-type]  # an attribute of a foreign module


@rule("timm.layers.drop.DropPath", training_only=True)
def drop_path(module: nn.Module, x: Moments) -> Moments:
    """As `dropout`, for whole samples; without timm's rescaling the mean shrinks to (1−p)m, Var = (1−p)(v + p m²)."""
    p = float(module.drop_prob or 0.0)  # type: ignore[arg-type]  # an attribute of a foreign module
    if not module.training or p == 0.0 or p >= 1.0 or module.scale_by_keep:
        return _dropped(x, p, module.training)
    return _dropped(x, p, True).scaled(1.0 - p)


@rule("timm.layers.drop.DropBlock2d", training_only=True, standing="approximate", reason="a region is dropped as one")
def drop_block(module: nn.Module, x: Moments) -> Moments:
    """As `dropout` with the share of dropped positions."""
    return _dropped(x, float(module.drop_prob), module.training)  # type: ignore[arg-type]  # an attribute of a foreign module


@rule(nn.AlphaDropout, nn.FeatureAlphaDropout, training_only=True)
def alpha_dropout(module: nn.AlphaDropout, x: Moments) -> Moments:
    """Dropped elements take the value α' = −1.7581, then ``a·x + b`` restores N(0, 1) (self-normalising networks).

    With q = 1−p, a = (q (1 + p α'²))^{-1/2}, b = −a p α': mean ``a(q m + p α') + b``, variance
    ``a² q (v + p (m − α')²)`` (law of total variance).
    """
    p = module.p
    if not module.training or p == 0.0:
        return x
    low, keep = -1.7580993408473766, 1.0 - p
    if keep == 0.0:
        return x.scaled(0.0)
    a = (keep * (1.0 + p * low * low)) ** -0.5
    mean = a * (keep * x.mean + p * low) - a * p * low
    return Moments(mean, a * a * keep * (x.var + p * (x.mean - low).square()))
