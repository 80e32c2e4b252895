"""Convolutions and linear layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normprop import Moments
from tests.rules.case import Case

torch.manual_seed(0)


def _weight(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64)


_W1, _W2, _W3 = _weight(6, 4, 3), _weight(6, 2, 3, 3), _weight(2, 4, 2, 2, 2)
_B6, _U1, _U2, _U3 = _weight(6), _weight(4, 3, 4), _weight(4, 3, 4, 4), _weight(4, 2, 2, 2, 2)
_L = _weight(5, 3)


class Standardised(nn.Conv2d):
    """A weight-standardised convolution written by its user."""

    def forward(self, input: Any) -> Any:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(input, weight, self.bias)


CASES = {
    "Conv1d": Case(nn.Conv1d(4, 3, 3), [(4, 5)]),
    "Conv2d": Case(nn.Conv2d(4, 3, 3), [(4, 5, 5)]),
    "Conv2d strided and dilated": Case(nn.Conv2d(4, 3, 3, stride=2, dilation=2), [(4, 9, 9)], samples=5000),
    "Conv2d in groups": Case(nn.Conv2d(4, 6, 3, groups=2, bias=False), [(4, 4, 4)]),
    "Conv2d depthwise": Case(nn.Conv2d(4, 8, 3, groups=4), [(4, 4, 4)]),
    "Conv2d valid": Case(nn.Conv2d(4, 3, (1, 3), padding="valid"), [(4, 4, 4)]),
    "Conv2d standardised": Case(Standardised(4, 3, 3), [(4, 4, 4)]),
    "Conv3d": Case(nn.Conv3d(4, 2, 2), [(4, 3, 3, 3)]),
    "conv1d": Case(lambda x: F.conv1d(x, _W1), [(4, 5)]),
    "conv2d": Case(lambda x: F.conv2d(x, _W2, _B6, groups=2), [(4, 5, 5)]),
    "conv2d by keywords": Case(lambda x: F.conv2d(input=x, weight=_W2, bias=_B6, stride=2, groups=2), [(4, 5, 5)]),
    "conv3d": Case(lambda x: torch.conv3d(x, _W3), [(4, 3, 3, 3)]),
    "ConvTranspose1d": Case(nn.ConvTranspose1d(4, 3, 4, stride=2, padding=3), [(4, 6)]),
    "ConvTranspose2d": Case(nn.ConvTranspose2d(4, 3, 4, stride=2, padding=3), [(4, 6, 6)], samples=8000),
    "ConvTranspose2d in groups": Case(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), [(4, 3, 3)]),
    "ConvTranspose2d dilated": Case(
        nn.ConvTranspose2d(4, 2, (4, 2), stride=(2, 3), dilation=(1, 2), padding=(3, 3)), [(4, 5, 5)], samples=8000
    ),
    "ConvTranspose2d of stride one": Case(nn.ConvTranspose2d(4, 3, 3, padding=2), [(4, 5, 5)]),
    "ConvTranspose3d": Case(nn.ConvTranspose3d(4, 2, 2, stride=2), [(4, 2, 2, 2)]),
    "conv_transpose1d": Case(lambda x: F.conv_transpose1d(x, _U1, stride=2, padding=3), [(4, 6)]),
    "conv_transpose2d": Case(lambda x: F.conv_transpose2d(x, _U2, stride=2, padding=3), [(4, 6, 6)], samples=8000),
    "conv_transpose3d": Case(lambda x: F.conv_transpose3d(x, _U3, stride=(2, 2, 2)), [(4, 2, 2, 2)]),
    "Linear": Case(nn.Linear(3, 5), [(3,)]),
    "Linear of tokens": Case(nn.Linear(3, 5, bias=False), [(2, 3)], channel=-1),
    "linear": Case(lambda x: F.linear(x, weight=_L), [(3,)]),
    "Bilinear": Case(nn.Bilinear(3, 4, 5), [(3,), (4,)], samples=50000),
}


def test_embedding() -> None:
    """Rows drawn evenly: the mean and variance of a column."""
    from normprop.rules.linear import embedding

    layer = nn.Embedding(50, 4).double()
    drawn = layer(torch.randint(50, (200000, 1), generator=torch.Generator().manual_seed(0))).detach().reshape(-1, 4)
    found = embedding(layer, Moments(torch.zeros(1, 1), torch.ones(1, 1)))
    error = drawn.std(0) / len(drawn) ** 0.5
    assert bool(((drawn.mean(0) - found.mean.flatten()).abs() < 5 * error).all())
    torch.testing.assert_close(drawn.var(0), found.var.detach().flatten(), rtol=0.02, atol=0.0)
