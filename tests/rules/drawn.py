"""Numbers drawn at random, alone and in masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.rules.case import Case


def dropped(x: Tensor) -> Tensor:
    return x / 0.7 * torch.floor(0.7 + torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device))


_I = [(3, 2)]
_FORMS: dict[str, Any] = {
    "rand": lambda x: x + torch.rand(x.shape, dtype=x.dtype), "rand_like": lambda x: x * torch.rand_like(x),
    "randn": lambda x: x + 0.3 * torch.randn(x.shape[0], 3, 2), "randn_like": lambda x: x + torch.randn_like(x) * x,
    "a normal number after an activation": lambda x: x + torch.randn_like(x).relu(),
    "randint": lambda x: x * torch.randint(3, x.shape), "randint from 2": lambda x: x * torch.randint(2, 7, x.shape),
    "randint_like": lambda x: x + torch.randint_like(x, -2, 5), "random_": lambda x: x + torch.empty_like(x).random_(3, 6),
    "uniform_": lambda x: x + x.new_empty(x.shape).uniform_(-1, 2),
    "uniform_ by keywords": lambda x: x * torch.empty(x.shape).uniform_(to=0.5),
    "normal": lambda x: x + torch.normal(0.5, 0.2, x.shape), "normal_": lambda x: x + torch.zeros_like(x).normal_(std=2.0),
    "normal around data": lambda x: torch.normal(x, 0.5),
    "exponential_": lambda x: x + torch.empty_like(x).exponential_(2.0),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full(x.shape, 0.3)),
    "bernoulli of data": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: x * x.new_empty(x.shape).bernoulli_(0.6),
    "the method bernoulli": lambda x: x * torch.ones_like(x).bernoulli(p=0.25),
    "bernoulli of chances": lambda x: x * (0.5 * torch.ones_like(x)).bernoulli(),
    "poisson": lambda x: x + torch.poisson(torch.full(x.shape, 1.5)),
    "poisson of data": lambda x: torch.poisson(x.relu()),
    "a mask of floors": dropped, "a mask of comparisons": lambda x: x * (torch.rand(x.shape[0], 1, 1) < 0.3) / 0.3,
    "a rounded mask": lambda x: x * torch.round(torch.rand_like(x) * 3),
    "ceil": lambda x: x * torch.ceil(2.5 * torch.rand_like(x) - 0.7),
    "a mask that is moved": lambda x: x * (torch.rand(2, x.shape[0]).t()[:, None] > 0.6).to(x.dtype).expand(-1, 3, 2),
    "a slice of a mask": lambda x: x * (torch.rand(x.shape[0], 6).reshape(-1, 3, 2)[..., :1] >= 0.2),
}  # fmt: skip
CASES = {name: Case(form, _I) for name, form in _FORMS.items()}
