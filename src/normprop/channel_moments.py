"""What is known of a tensor: the mean and variance of its elements, per channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


def safe_sqrt(x: Tensor) -> Tensor:
    """√x whose gradient at 0 is 0 instead of infinite (a γ that starts at zero makes a variance of exactly zero)."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance of a tensor's elements over samples and positions, per channel.

    Inside a walk both tensors have the rank of the tensor they describe, with size 1 along every dimension over which
    the moments do not vary: an image of shape ``(N, C, H, W)`` is described by tensors of shape ``(1, C, 1, 1)``,
    tokens ``(N, L, C)`` by ``(1, 1, C)``. A user gives vectors ``(C,)``; `aligned` brings them into that form.

    Attributes:
        mean: expected value, any floating dtype.
        var: variance, the same shape.

    Example:
        >>> import torch
        >>> m = Moments(torch.zeros(3), torch.ones(3)).scaled(2.0).shifted(1.0)
        >>> m.mean.tolist(), m.var.tolist()
        ([1.0, 1.0, 1.0], [4.0, 4.0, 4.0])
    """

    mean: Tensor
    var: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation; its gradient is finite where the variance is zero."""
        return safe_sqrt(self.var)

    @property
    def second(self) -> Tensor:
        """E x² = var + mean²."""
        return self.var + self.mean.square()

    def scaled(self, factor: Tensor | float) -> Moments:
        """Moments of ``factor · x``."""
        return Moments(self.mean * factor, self.var * (factor * factor))

    def shifted(self, offset: Tensor | float) -> Moments:
        """Moments of ``x + offset``."""
        mean = self.mean + offset
        if mean.shape == self.var.shape:
            return Moments(mean, self.var)
        return Moments(*torch.broadcast_tensors(mean, self.var))

    def plus(self, other: Moments) -> Moments:
        """Moments of the sum of two uncorrelated tensors: means add, variances add."""
        return Moments(self.mean + other.mean, self.var + other.var)

    def times(self, other: Moments) -> Moments:
        """Moments of the product of two independent tensors: ``v = v₁v₂ + m₁²v₂ + m₂²v₁``."""
        var = self.var * other.var + self.mean.square() * other.var + other.mean.square() * self.var
        return Moments(self.mean * other.mean, var)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same moments in other places: mean and variance at their common shape, both moved."""
        mean, var = torch.broadcast_tensors(self.mean, self.var)
        return type(self)(move(mean), move(var))

    def pooled(self, dims: Sequence[int], *, keepdim: bool = True) -> Moments:
        """Moments of the mixture over `dims`: the mean of the means; the mean variance plus the variance of the means."""
        dims = tuple(dims)
        mean = self.mean.mean(dims, keepdim=True)
        var = (self.var + (self.mean - mean).square()).mean(dims, keepdim=True)
        if not keepdim:
            mean, var = mean.squeeze(dims), var.squeeze(dims)
        return Moments(mean, var)

    def expanded(self, shape: Sequence[int]) -> Self:
        """The same moments as tensors of the given shape (views, no memory); -1 keeps a dimension."""
        return type(self)(self.mean.expand(*shape), self.var.expand(*shape))

    def channels(self, dim: int = 1) -> Moments:
        """Vectors ``(C,)`` along `dim`; what varies along other dimensions is pooled.

        Args:
            dim: the channel dimension, 1 for images and -1 for tokens.
        """
        rank = self.mean.dim()
        others = [d for d in range(rank) if d != dim % rank]
        if all(self.mean.shape[d] == self.var.shape[d] == 1 for d in others):
            return Moments(self.mean.reshape(-1), self.var.reshape(-1))
        pooled = self.pooled(others)
        return Moments(pooled.mean.reshape(-1), pooled.var.reshape(-1))

    def aligned(self, rank: int, dim: int = 1) -> Moments:
        """Vectors (or scalars) as tensors of the given rank with the channels along `dim`."""
        shape = [1] * rank
        shape[dim] = -1
        return Moments(self.mean.reshape(shape), self.var.reshape(shape))
