"""Products of activations, softmax and attention."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normprop import Moments
from normprop.rules.pooling import GLOBAL_CORRELATION
from tests.rules.case import Case

torch.manual_seed(0)
_M = torch.randn(3, 4, dtype=torch.float64)
_N = torch.randn(5, 2, dtype=torch.float64)
_STANDARD = Moments(torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64))
_QUIET = Moments(torch.zeros(16, dtype=torch.float64), torch.full((16,), 0.3, dtype=torch.float64))
_TOKENS = {"exact": False, "channel": -1, "samples": 2000, "moments": _STANDARD}
_ALIKE = _TOKENS | {"correlation": GLOBAL_CORRELATION}  # tokens among each other
_ALIKE_CHANNELS = {**_ALIKE, "moments": None}
_PRODUCTS = {
    "matmul": torch.matmul, "operator": operator.matmul, "bmm": torch.bmm,
    "method": lambda x, y: x.matmul(y), "bmm method": lambda x, y: x.bmm(y),
}  # fmt: skip


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.attention(x, x, x, need_weights=False)


CASES = {
    **{name: Case(f, [(2, 3), (3, 4)], channel=2) for name, f in _PRODUCTS.items()},
    "mm by a constant": Case(lambda x: torch.mm(x, _M), [(3,)]),
    "mm method": Case(lambda x: x.mm(_M), [(3,)]),
    "matmul of a constant": Case(lambda x: _N @ x, [(2, 3)], channel=-1),
    "addmm": Case(lambda x: torch.addmm(torch.ones(4, dtype=torch.float64), x, _M, beta=2.0, alpha=0.5), [(3,)]),
    "addmm method": Case(lambda x, y: x.addmm(y, _M), [(4,), (3,)]),
    "baddbmm": Case(torch.baddbmm, [(2, 4), (2, 3), (3, 4)], channel=2),
    "baddbmm method": Case(lambda x, y, z: x.baddbmm(y, z), [(2, 4), (2, 3), (3, 4)], channel=2),
    "einsum": Case(lambda x, y: torch.einsum("bic,bjc->bij", x, y), [(2, 3), (4, 3)], channel=-1),
    "einsum by a constant": Case(lambda x: torch.einsum("...c,cd->...d", x, _M), [(2, 3)], channel=-1),
    "scaled_dot_product_attention": Case(F.scaled_dot_product_attention, [(2, 12, 16)] * 3, tolerance=0.2, **_ALIKE),
    "MultiheadAttention": Case(SelfAttention(), [(12, 16)], tolerance=0.3, **_ALIKE),
    "averages": Case(lambda x, y: F.softmax(0.7 * x, -1) @ y, [(5, 12), (12, 4)], tolerance=0.2, **_ALIKE_CHANNELS),
    "averages of many": Case(lambda x, y: (x.softmax(-1)).bmm(y), [(2, 64), (64, 3)], tolerance=0.2, **_ALIKE_CHANNELS),
    "softmax": Case(lambda x: F.softmax(0.5 * x, dim=-1), [(8, 16)], tolerance=0.25, **_TOKENS),
    "torch.softmax": Case(lambda x: torch.softmax(0.5 * x, -1), [(8, 16)], tolerance=0.25, **_TOKENS),
    "softmax method": Case(lambda x: (0.5 * x).softmax(-1), [(8, 16)], tolerance=0.25, **_TOKENS),
    "Softmax": Case(nn.Sequential(nn.Tanh(), nn.Softmax(dim=-1)), [(8, 16)], tolerance=0.25, **_TOKENS),
    "Softmax2d": Case(nn.Softmax2d(), [(16, 2, 2)], exact=False, tolerance=0.25, samples=2000, moments=_QUIET),
    "log_softmax": Case(lambda x: F.log_softmax(x, dim=-1), [(8, 16)], tolerance=0.25, **_TOKENS),
    "torch.log_softmax": Case(lambda x: torch.log_softmax(x, -1), [(8, 16)], tolerance=0.25, **_TOKENS),
    "log_softmax method": Case(lambda x: x.log_softmax(-1), [(8, 16)], tolerance=0.25, **_TOKENS),
    "LogSoftmax": Case(nn.LogSoftmax(dim=-1), [(8, 16)], tolerance=0.25, **_TOKENS),
}  # fmt: skip
