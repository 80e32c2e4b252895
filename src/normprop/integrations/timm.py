"""timm: its leaves, BatchNorm with an activation inside, and layers of its own that have a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.layers as layers
from timm.layers.norm_act import SyncBatchNormAct
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from normprop.integrations import Integration, Shape
from normprop.rules import linear, normalization, pooling
from normprop.rules.table import rule


def _expand(module: Any, call: Callable[..., Any], x: Any) -> Any:
    """BatchNorm, then the dropout and the activation that sit inside the module."""
    return module.act(module.drop(call(x)))


rule(layers.BatchNormAct2d, SyncBatchNormAct)(normalization.batch_norm)
rule(layers.Conv2dSame)(linear.convolution)
rule(AvgPool2dSame, standing="approximate", reason="as AvgPool2d")(pooling.average_pool)
rule(MaxPool2dSame, standing="approximate", reason="as MaxPool2d")(pooling.max_pool)


def _shape(model: nn.Module) -> Shape | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    return tuple(size) if size else None


INTEGRATION = Integration(
    leaf_modules=tuple(layers.get_notrace_modules()),
    leaf_functions=tuple(f for f in layers.get_notrace_functions() if callable(f)),
    expansions={layers.BatchNormAct2d: _expand, SyncBatchNormAct: _expand},
    shape_of=_shape,
)
