"""timm: its leaves, BatchNorm with an activation inside, and layers of its own that have a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers._fx import get_notrace_functions
from timm.layers.cond_conv2d import CondConv2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from normprop.integrations import Integration, Shape
from normprop.rules import linear, normalization, pooling, shape
from normprop.rules.table import rule, unsupported


def _expand(module: Any, call: Callable[..., Any], x: Any) -> Any:
    """BatchNorm, then the dropout and the activation that sit inside the module, if there are any."""
    x = call(x)
    for inner in (getattr(module, "drop", None), getattr(module, "act", None)):
        x = x if inner is None else inner(x)
    return x


rule(BatchNormAct2d, SyncBatchNormAct)(normalization.batch_norm)
unsupported(CondConv2d, reason="the weights of a conditional convolution depend on the input")
rule(Conv2dSame)(linear.convolution)
rule(AvgPool2dSame, standing="approximate", reason="as AvgPool2d")(pooling.average_pool)
rule(MaxPool2dSame, standing="approximate", reason="as MaxPool2d")(pooling.max_pool)


_NO_TRACE: list[Any] = get_notrace_functions()  # type: ignore[no-untyped-call]  # timm has no types for it
_FUNCTIONS: tuple[Callable[..., Any], ...] = tuple(f for f in _NO_TRACE if callable(f))

for _function in _FUNCTIONS:
    if getattr(_function, "__name__", "").startswith(("window_reverse", "grid_reverse", "deblockify")):
        rule(_function, shaped=True)(shape.regroup)  # windows of positions put back into an image


def _shape(model: nn.Module) -> Shape | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    return tuple(size) if size else None


INTEGRATION = Integration(
    leaf_functions=_FUNCTIONS,
    expansions={BatchNormAct2d: _expand, SyncBatchNormAct: _expand},
    shape_of=_shape,
)
