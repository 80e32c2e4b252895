"""Numbers drawn evenly from an interval, as masks of dropout are made of: floor and comparisons of them are exact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normprop.channel_moments import Moments


class Uniform(Moments):
    """Moments of an even distribution; scaled and shifted it stays even."""

    def scaled(self, factor: Tensor | float) -> Uniform:
        """Moments of ``factor · x``."""
        return Uniform(self.mean * factor, self.var * (factor * factor))

    def shifted(self, offset: Tensor | float) -> Uniform:
        """Moments of ``x + offset``."""
        moved = super().shifted(offset)
        return Uniform(moved.mean, moved.var)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Both ends of the interval."""
        half = math.sqrt(3.0) * self.std
        return self.mean - half, self.mean + half


def uniform_activation(name: str, x: Uniform, parameters: Mapping[str, Any]) -> Moments | None:
    """Floor, ceil, round and comparisons of numbers drawn evenly, exact (derived); None for all else.

    ``E ⌊u⌋ᵏ`` is the integral of a step function over the interval, divided by its length.
    """
    if name in ("gt", "ge", "lt", "le") and not isinstance(parameters["other"], Moments):
        low, high = x.bounds()
        below = ((parameters["other"] - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)).clamp(0.0, 1.0)
        share = below if name in ("lt", "le") else 1.0 - below
        return Moments(share, share * (1.0 - share))
    if name == "floor":
        return _floored(*x.bounds())
    if name == "ceil":
        return _floored(*x.scaled(-1.0).bounds()).scaled(-1.0)
    if name == "round" and not parameters.get("decimals"):
        return _floored(*x.shifted(0.5).bounds())
    return None


def _floored(low: Tensor, high: Tensor) -> Moments:
    """``∫_n^t (⌊u⌋ − n) = k(t − n) − k(k+1)/2`` with k = ⌊t⌋ − n, around the lowest integer n, so that little cancels."""
    near = 16 * torch.finfo(low.dtype).eps * (1 + high.abs())  # ends that are integers but for rounding
    n = (low + near).floor().detach()
    length = (high - low).clamp(min=torch.finfo(low.dtype).tiny)

    def integrals(t: Tensor) -> tuple[Tensor, Tensor]:
        k = (t - n + near).floor().clamp(min=0.0).detach()
        return k * (t - n) - k * (k + 1) / 2, k.square() * (t - n - k) + (k - 1) * k * (2 * k - 1) / 6

    (first, second), (first_low, second_low) = integrals(high), integrals(low)
    mean, square = (first - first_low) / length, (second - second_low) / length
    return Moments(n + mean, (square - mean.square()).clamp(min=0.0))
