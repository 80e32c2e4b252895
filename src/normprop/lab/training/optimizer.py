"""The optimizer of a recipe, with the clipping and projection that its normaliser needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from normprop.lab.networks.normalizers import normalizer
from normprop.lab.training.recipe import CLIP_UP_TO, OptimizerName, Recipe, rate_at
from normprop.optim import AdaptiveGradientClipping, UnitNormProjection

_MAKERS: dict[OptimizerName, Callable[[Any, Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups, recipe: torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum),
    "adam": lambda groups, recipe: torch.optim.Adam(groups, lr=recipe.lr),
    "adamw": lambda groups, recipe: torch.optim.AdamW(groups, lr=recipe.lr),
    "rmsprop": lambda groups, recipe: torch.optim.RMSprop(groups, lr=recipe.lr),
}


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer, weight decay on weights alone, and the clipping and projection that the normaliser needs."""
    assert recipe.lr is not None
    trainable = [p for p in model.parameters() if p.requires_grad]
    # Some layers shape their gains as filters of one number.
    weights = [p for p in trainable if p.dim() > 1 and p[0].numel() > 1]
    others = [p for p in trainable if p.dim() <= 1 or p[0].numel() == 1]
    groups = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = _MAKERS[recipe.optimizer](groups, recipe)
    if recipe.clip:
        up_to = rate_at(recipe.batch_size, CLIP_UP_TO) if recipe.optimizer == "sgd" else math.inf
        AdaptiveGradientClipping(optimizer, clip=recipe.clip, up_to=up_to)
    if normalizer(recipe.norm).method == "paper":
        UnitNormProjection(optimizer, model)
    return optimizer
