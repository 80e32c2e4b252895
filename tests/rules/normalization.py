"""Normalisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.rules.case import Case, channel_moments

torch.manual_seed(0)
_C = 16
_W, _B = torch.rand(_C, dtype=torch.float64) + 0.5, torch.randn(_C, dtype=torch.float64)
_GIVEN = channel_moments(_C)


def _trained(kind: type[nn.Module], channels: int = _C) -> nn.Module:
    """A BatchNorm whose running statistics are those of its input."""
    norm = kind(channels).double().eval()
    norm.weight.data.copy_(_W)
    norm.bias.data.copy_(_B)
    norm.running_mean.copy_(_GIVEN.mean)
    norm.running_var.copy_(_GIVEN.var - norm.eps)
    return norm


def _affine(norm: nn.Module) -> nn.Module:
    norm.weight.data.copy_(_W)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data.copy_(_B)
    return norm


class Functional(nn.Module):
    """A normaliser as a function of an input, a weight and a bias."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(_W.clone()), nn.Parameter(_B.clone())
        self.register_buffer("mean", _GIVEN.mean.clone())
        self.register_buffer("var", _GIVEN.var.clone())

    def forward(self, x: Any) -> Any:
        return self.function(x, self)


_NEAR = {"exact": False, "tolerance": 0.12, "samples": 4000}
_IMAGE, _TOKENS = [(_C, 6, 6)], [(5, _C)]

CASES = {
    "BatchNorm1d": Case(_trained(nn.BatchNorm1d), [(_C,)]),
    "BatchNorm2d": Case(_trained(nn.BatchNorm2d), [(_C, 2, 2)]),
    "BatchNorm3d": Case(_trained(nn.BatchNorm3d), [(_C, 2, 1, 1)]),
    "SyncBatchNorm": Case(_trained(nn.SyncBatchNorm), [(_C, 2, 2)]),
    "batch_norm": Case(Functional(lambda x, m: F.batch_norm(x, m.mean, m.var, m.weight, m.bias, eps=0.0)), [(_C, 2)]),
    "torch.batch_norm": Case(
        Functional(lambda x, m: torch.batch_norm(x, m.weight, m.bias, m.mean, m.var, False, 0.1, 0.0, False)), [(_C, 2)]
    ),
    "LayerNorm": Case(_affine(nn.LayerNorm(_C)), _TOKENS, channel=-1, **_NEAR),
    "layer_norm": Case(Functional(lambda x, m: F.layer_norm(x, (_C,), m.weight, m.bias)), _TOKENS, channel=-1, **_NEAR),
    "torch.layer_norm": Case(lambda x: torch.layer_norm(x, (_C,)), _TOKENS, channel=-1, **_NEAR),
    "RMSNorm": Case(_affine(nn.RMSNorm(_C)), _TOKENS, channel=-1, **_NEAR),
    "rms_norm": Case(Functional(lambda x, m: F.rms_norm(x, (_C,), m.weight)), _TOKENS, channel=-1, **_NEAR),
    "torch.rms_norm": Case(lambda x: torch.rms_norm(x, (_C,)), _TOKENS, channel=-1, **_NEAR),
    "GroupNorm": Case(_affine(nn.GroupNorm(4, _C)), _IMAGE, **_NEAR),
    "group_norm": Case(Functional(lambda x, m: F.group_norm(x, 4, m.weight, m.bias)), _IMAGE, **_NEAR),
    "torch.group_norm": Case(lambda x: torch.group_norm(x, 4), _IMAGE, **_NEAR),
    "InstanceNorm1d": Case(_affine(nn.InstanceNorm1d(_C, affine=True)), [(_C, 40)], **_NEAR),
    "InstanceNorm2d": Case(_affine(nn.InstanceNorm2d(_C, affine=True)), _IMAGE, **_NEAR),
    "InstanceNorm3d": Case(nn.InstanceNorm3d(_C), [(_C, 3, 3, 3)], **_NEAR),
    "instance_norm": Case(Functional(lambda x, m: F.instance_norm(x, weight=m.weight, bias=m.bias)), _IMAGE, **_NEAR),
    "LocalResponseNorm": Case(nn.LocalResponseNorm(5, alpha=0.5), [(_C, 3, 3)], **(_NEAR | {"tolerance": 0.2})),
    "local_response_norm": Case(lambda x: F.local_response_norm(x, 5, 0.5), [(_C, 3, 3)], **(_NEAR | {"tolerance": 0.2})),
}
