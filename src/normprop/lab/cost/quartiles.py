"""The median and the quartiles of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Quartiles:
    """The median with the lower and the upper quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """The quartiles of a sample, by linear interpolation between its order statistics.

        Args:
            values: One value or more.

        Example:
            >>> Quartiles.of([4.0, 1.0, 2.0, 3.0, 5.0])
            Quartiles(low=2.0, median=3.0, high=4.0)
        """
        at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(at).tolist())

    def __str__(self) -> str:
        decimals = 2 if self.high < 10 else 1
        return f"{self.median:.{decimals + 1}f} [{self.low:.{decimals}f}–{self.high:.{decimals}f}]"
