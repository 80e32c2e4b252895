"""Dropout in training; torchvision's drop-path."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth, stochastic_depth

from tests.rules.case import Case

_TRAIN = {"train": True}


class Branch(nn.Module):
    """A residual branch that is dropped as a whole."""

    def forward(self, x: Any) -> Any:
        return stochastic_depth(x, 0.3, "row", True)


CASES = {
    "Dropout": Case(nn.Dropout(0.3), [(3, 2)], **_TRAIN),
    "Dropout in eval mode": Case(nn.Dropout(0.3), [(3, 2)]),
    "Dropout1d": Case(nn.Dropout1d(0.3), [(3, 2)], **_TRAIN),
    "Dropout2d": Case(nn.Dropout2d(0.3), [(3, 2, 2)], **_TRAIN),
    "Dropout3d": Case(nn.Dropout3d(0.3), [(3, 2, 1, 2)], **_TRAIN),
    "AlphaDropout": Case(nn.AlphaDropout(0.2), [(3, 2)], **_TRAIN),
    "FeatureAlphaDropout": Case(nn.FeatureAlphaDropout(0.2), [(3, 2, 2)], **_TRAIN),
    "dropout": Case(lambda x: F.dropout(x, 0.3), [(3, 2)]),
    "dropout1d": Case(lambda x: F.dropout1d(x, 0.3), [(3, 2)]),
    "dropout2d": Case(lambda x: F.dropout2d(x, 0.3), [(3, 2, 2)]),
    "dropout3d": Case(lambda x: F.dropout3d(x, 0.3), [(3, 2, 1, 2)]),
    "torch.dropout": Case(lambda x: torch.dropout(x, 0.3, True), [(3, 2)]),
    "StochasticDepth": Case(StochasticDepth(0.3, "row"), [(3, 2)], **_TRAIN),
    "stochastic_depth": Case(Branch(), [(3, 2)]),
}
