"""How the values of a tensor are distributed, beside the Gaussian that rules assume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_END, _BINS = 4.0, 40
_ENOUGH, _LEAST = 2**17, 8  # values in all, and along each dimension


@dataclass(frozen=True)
class Histogram:
    """Shares of values by their distance from their channel's mean, in standard deviations of the channel.

    Attributes:
        shares: of 40 equal bins from −4 to 4; values beyond count in the outermost.
        count: number of values.

    Example:
        >>> import torch
        >>> round(Histogram.of(torch.randn(8, 3, 64, 64)).distance, 1)
        0.0
    """

    shares: tuple[float, ...]
    count: int

    @classmethod
    def of(cls, value: Tensor, others: Sequence[int] | None = None) -> Histogram:
        """Count the values of a batch, of a large one every n-th along the dimensions that are no channels.

        Args:
            value: ``(samples, channels, …)``.
            others: dimensions that are no channels; all but the second by default.
        """
        dims = [0, *range(2, value.dim())] if others is None else list(others)
        kept = value
        for dim in reversed(dims):
            step = min(-(-kept.numel() // _ENOUGH), max(1, kept.shape[dim] // _LEAST))
            kept = kept.movedim(dim, 0)[::step].movedim(0, dim)
        kept = kept.float()
        std, mean = torch.std_mean(kept, dims, correction=0, keepdim=True)
        varying = (std > 0).expand_as(kept)
        standard = ((kept - mean) / torch.where(std > 0, std, 1.0))[varying]
        counted = standard[standard.isfinite()].clamp(-_END, _END)
        shares = torch.histc(counted.cpu(), _BINS, -_END, _END) / max(1, counted.numel())
        return cls(tuple(shares.tolist()), counted.numel())

    @property
    def distance(self) -> float:
        """Total variation distance from a standard Gaussian: 0 for the same shares, at most 1."""
        return sum(abs(a - b) for a, b in zip(self.shares, gaussian_shares(), strict=True)) / 2


def gaussian_shares() -> list[float]:
    """The shares of a standard Gaussian in the bins of a `Histogram`.

    Example:
        >>> round(sum(gaussian_shares()), 6)
        1.0
    """
    edges = [-_END + 2 * _END * i / _BINS for i in range(_BINS + 1)]
    below = [0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges]
    below[0], below[-1] = 0.0, 1.0
    return [b - a for a, b in pairwise(below)]
