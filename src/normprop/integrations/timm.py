"""timm: its leaves, BatchNorm with an activation inside, and layers of its own that have a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers.cond_conv2d import CondConv2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from normprop.integrations import Integration, Shape
from normprop.rules import linear, normalization, pooling
from normprop.rules.table import rule, unsupported


def _plain(module: Any) -> Callable[..., Any]:
    """The forward of the torch class that a norm-act module extends; frozen ones are an affine."""
    if isinstance(module, FrozenBatchNormAct2d):
        return _frozen
    forward: Callable[..., Any] = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.")).forward  # type: ignore[attr-defined]  # torch's modules have one
    return forward


def _frozen(module: Any, x: Any) -> Any:
    scale = module.weight * (module.running_var + module.eps).rsqrt()
    shift = module.bias - module.running_mean * scale
    return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def _expand(module: Any, call: Callable[..., Any], x: Any) -> Any:
    """BatchNorm, then the dropout and the activation that sit inside the module, if there are any."""
    x = call(lambda x: _plain(module)(module, x), x)
    for inner in (getattr(module, "drop", None), getattr(module, "act", None)):
        x = x if inner is None else inner(x)
    return x


rule(BatchNormAct2d, SyncBatchNormAct)(normalization.batch_norm)
unsupported(CondConv2d, reason="the weights of a conditional convolution depend on the input")
rule(Conv2dSame)(linear.convolution)
rule(AvgPool2dSame, standing="approximate", reason="as AvgPool2d")(pooling.average_pool)
rule(MaxPool2dSame, standing="approximate", reason="as MaxPool2d")(pooling.max_pool)


def _shape(model: nn.Module) -> Shape | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    return tuple(size) if size else None


INTEGRATION = Integration(
    expansions={BatchNormAct2d: _expand, SyncBatchNormAct: _expand, FrozenBatchNormAct2d: _expand},
    shape_of=_shape,
)
