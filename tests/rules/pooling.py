"""Windows and reductions, sampled with the correlation that the rules take."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normprop.rules.pooling import GLOBAL_CORRELATION, WINDOW_CORRELATION
from tests.rules.case import Case

_WINDOW = {"correlation": WINDOW_CORRELATION}
_GLOBAL = {"correlation": GLOBAL_CORRELATION}
_NEAR = {"exact": False, "tolerance": 0.15, "samples": 4000}
_1, _2, _3 = [(3, 6)], [(3, 4, 4)], [(3, 4, 4, 2)]
_SMALL = {"samples": 5000}


class Unpooled(nn.Module):
    """Pooled with indices, and put back."""

    def __init__(self, pool: nn.Module, unpool: nn.Module) -> None:
        super().__init__()
        self.pool, self.unpool = pool, unpool

    def forward(self, x: Any) -> Any:
        return self.unpool(*self.pool(x))


def _unpooled(dims: int) -> Case:
    pool, unpool = ((nn.MaxPool1d, nn.MaxUnpool1d), (nn.MaxPool2d, nn.MaxUnpool2d), (nn.MaxPool3d, nn.MaxUnpool3d))[dims - 1]
    return Case(Unpooled(pool(2, return_indices=True), unpool(2)), [(3, *(4,) * dims)], samples=5000, **_WINDOW)


CASES = {
    "AvgPool1d": Case(nn.AvgPool1d(3, 1), _1, **_WINDOW),
    "AvgPool2d": Case(nn.AvgPool2d(2), _2, **_WINDOW),
    "AvgPool2d with a divisor": Case(nn.AvgPool2d(2, divisor_override=3), _2, **_WINDOW),
    "AvgPool2d of a rectangle": Case(nn.AvgPool2d((1, 2)), _2, **_WINDOW),
    "AvgPool3d": Case(nn.AvgPool3d(2), _3, **_WINDOW),
    "avg_pool1d": Case(lambda x: F.avg_pool1d(x, 2), _1, **_WINDOW),
    "avg_pool2d": Case(lambda x: F.avg_pool2d(x, kernel_size=2, stride=2, divisor_override=2), _2, **_WINDOW),
    "avg_pool3d": Case(lambda x: F.avg_pool3d(x, (2, 2, 1)), _3, **_WINDOW),
    "AdaptiveAvgPool1d": Case(nn.AdaptiveAvgPool1d(2), _1, **_WINDOW),
    "AdaptiveAvgPool2d": Case(nn.AdaptiveAvgPool2d((2, 2)), _2, **_WINDOW),
    "AdaptiveAvgPool2d of all": Case(nn.AdaptiveAvgPool2d(1), _2, **_GLOBAL),
    "AdaptiveAvgPool3d": Case(nn.AdaptiveAvgPool3d((2, None, 2)), _3, **_WINDOW),
    "adaptive_avg_pool1d": Case(lambda x: F.adaptive_avg_pool1d(x, 1), _1, **_GLOBAL),
    "adaptive_avg_pool2d": Case(lambda x: F.adaptive_avg_pool2d(x, 1), _2, **_GLOBAL),
    "adaptive_avg_pool3d": Case(lambda x: F.adaptive_avg_pool3d(x, 1), _3, **_GLOBAL),
    "MaxPool1d": Case(nn.MaxPool1d(3, 1), _1, **_WINDOW),
    "MaxPool2d": Case(nn.MaxPool2d(2), _2, **_WINDOW),
    "MaxPool3d": Case(nn.MaxPool3d((2, 2, 1)), _3, **_WINDOW),
    "max_pool1d": Case(lambda x: F.max_pool1d(x, 2), _1, **_WINDOW),
    "max_pool2d": Case(lambda x: F.max_pool2d(x, 2, ceil_mode=True), _2, **_WINDOW),
    "max_pool3d": Case(lambda x: F.max_pool3d(x, 2), _3, **_WINDOW),
    **{
        f"torch.max_pool{n}d": Case(lambda x, n=n: getattr(torch, f"max_pool{n}d")(x, 2), [(3, *(4,) * n)], **_WINDOW)
        for n in (1, 2, 3)
    },
    "max_pool1d with indices": Case(lambda x: F.max_pool1d(x, 2, return_indices=True)[0], _1, **_WINDOW),
    "max_pool2d with indices": Case(lambda x: F.max_pool2d(x, 2, return_indices=True)[0], _2, **_WINDOW),
    "max_pool3d with indices": Case(lambda x: F.max_pool3d(x, 2, return_indices=True)[0], _3, **_WINDOW),
    "MaxUnpool1d": _unpooled(1),
    "MaxUnpool2d": _unpooled(2),
    "MaxUnpool3d": _unpooled(3),
    "AdaptiveMaxPool1d": Case(nn.AdaptiveMaxPool1d(3), _1, **_WINDOW),
    "AdaptiveMaxPool2d": Case(nn.AdaptiveMaxPool2d(1), _2, **_GLOBAL),
    "AdaptiveMaxPool3d": Case(nn.AdaptiveMaxPool3d(1), _3, **_GLOBAL),
    "adaptive_max_pool1d": Case(lambda x: F.adaptive_max_pool1d(x, 3), _1, **_WINDOW),
    "adaptive_max_pool2d": Case(lambda x: F.adaptive_max_pool2d(x, 1), _2, **_GLOBAL),
    "adaptive_max_pool3d": Case(lambda x: F.adaptive_max_pool3d(x, 1), _3, **_GLOBAL),
    "LPPool1d": Case(nn.LPPool1d(1, 3), _1, **_WINDOW),
    "LPPool2d": Case(nn.LPPool2d(2, 2), [(3, 4, 4)], positive=True, **_NEAR, **_WINDOW),
    "LPPool3d": Case(nn.LPPool3d(2, 2), _3, positive=True, **_NEAR, **_WINDOW),
    "lp_pool1d": Case(lambda x: F.lp_pool1d(x, 2.0, 3), _1, positive=True, **_NEAR, **_WINDOW),
    "lp_pool2d": Case(lambda x: F.lp_pool2d(x, 1.0, 2), _2, **_WINDOW),
    "lp_pool3d": Case(lambda x: F.lp_pool3d(x, 2.0, 2), _3, positive=True, **_NEAR, **_WINDOW),
    "mean of positions": Case(lambda x: x.mean((2, 3)), _2, **_GLOBAL),
    "mean by keywords": Case(lambda x: torch.mean(input=x, dim=(-2, -1), keepdim=True), _2, **_GLOBAL),
    "mean of channels": Case(lambda x: x.mean(1, keepdim=True), _2),
    "sum of positions": Case(lambda x: x.sum(dim=(2, 3)), _2, **_GLOBAL),
    "sum of channels": Case(lambda x: torch.sum(x, 1), _2),
    "amax": Case(lambda x: torch.amax(x, (2, 3)), _2, **_GLOBAL),
    "amax method": Case(lambda x: x.amax(dim=(2, 3), keepdim=True), _2, **_GLOBAL),
    "amin": Case(lambda x: torch.amin(x, (2, 3)), _2, **_GLOBAL),
    "amin method": Case(lambda x: x.amin(dim=-1), _2, **_GLOBAL),
    "max along a dimension": Case(lambda x: torch.max(x, 2)[0], _2, **_GLOBAL),
    "max of two": Case(lambda x, y: torch.max(x, y), [(3, 2), (3, 2)]),
    "max method": Case(lambda x: x.max(dim=-1).values, _2, **_GLOBAL),
    "max of channels": Case(lambda x: torch.max(x, dim=1, keepdim=True)[0], [(8, 3)], **(_NEAR | {"tolerance": 0.35})),
    "min along a dimension": Case(lambda x: torch.min(x, 2).values, _2, **_GLOBAL),
    "min of two": Case(lambda x, y: x.min(y), [(3, 2), (3, 2)]),
    "var": Case(lambda x: torch.var(x, (2, 3)), [(3, 8, 8)], **_NEAR, **_GLOBAL),
    "var method": Case(lambda x: x.var(dim=(2, 3), keepdim=True, unbiased=False), [(3, 8, 8)], **_NEAR, **_GLOBAL),
    "std": Case(lambda x: torch.std(x, (2, 3)), [(3, 8, 8)], **_NEAR, **_GLOBAL),
    "var_mean": Case(lambda x: torch.var_mean(x, (2, 3))[0], [(3, 8, 8)], **_NEAR, **_GLOBAL),
    "std_mean": Case(lambda x: torch.std_mean(x, (2, 3)), [(3, 8, 8)], **_NEAR, **_GLOBAL),
    "std method": Case(lambda x: x.std(dim=(2, 3), keepdim=True), [(3, 8, 8)], **_NEAR, **_GLOBAL),
    "norm": Case(lambda x: torch.norm(x, p=2, dim=(2, 3), keepdim=True), [(3, 8, 8)], **_NEAR, **_GLOBAL),
    "norm method": Case(lambda x: x.norm(p=2, dim=(2, 3)), [(3, 8, 8)], **_NEAR, **_GLOBAL),
    "vector_norm": Case(lambda x: torch.linalg.vector_norm(x, dim=(2, 3)), [(3, 8, 8)], **_NEAR, **_GLOBAL),
    "normalize": Case(lambda x: F.normalize(x, dim=1), [(64, 2)], **_NEAR),
    "entry of several": Case(lambda x: operator.getitem(x.max(2), 0), _2, **_GLOBAL),
}
