"""Moving average batch normalisation (Yan et al. 2020, arXiv 2001.06838), written from its paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# The last batches whose statistics count, how slowly those for evaluation follow, and how far the two may be apart.
_BATCHES, _MOMENTUM, _APART = 16, 0.98, 5.0
_EPS = 1e-5


class MovingAverageNorm(nn.Module):
    """y = γ r x/χ̄ + β without a mean, which centred filters in front of it take away (`Centred`).

    χ² is a batch's second moment per channel, χ̄² its mean over the last 16 batches and χ̂² over many (momentum .98). In
    evaluation, and in training up to a factor of 5, y is γ x/χ̂ + β: r = χ̄/χ̂, clipped. BatchNorm's gradient has a statistic
    too, Ψ = E[x̂ ∂L/∂x̂] for x̂ = x/χ̄, and takes its mean over the last 16 batches as well::

        ∂L/∂x = (∂L/∂x̂ − x̂ Ψ̄)/χ̄

    Means are over as many batches as there were. r is 1 until there were 16.

    Args:
        channels: of its input, ``(N, channels, …)``.
    """

    recent: Tensor
    pulls: Tensor
    squares: Tensor
    seen: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("recent", torch.zeros(_BATCHES, channels))
        self.register_buffer("pulls", torch.zeros(_BATCHES, channels))
        self.register_buffer("squares", torch.ones(channels))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised; in training the statistics move."""
        shape = (-1, *[1] * (x.dim() - 2))
        gamma, beta = self.weight.view(shape), self.bias.view(shape)
        if not self.training:
            return x * (gamma * (self.squares.view(shape) + _EPS).rsqrt()) + beta
        place, count = int(self.seen) % _BATCHES, min(int(self.seen) + 1, _BATCHES)
        with torch.no_grad():
            self.recent[place] = x.square().mean(_others(x))
            square = self.recent[:count].mean(0)
            self.seen += 1
            self.squares.lerp_(square, max(1 - _MOMENTUM, 1 / float(self.seen)))
            ratio = ((square + _EPS) / (self.squares + _EPS)).sqrt().clamp(1 / _APART, _APART)
            if count < _BATCHES:
                ratio.fill_(1)
        normalised: Tensor = _Normalised.apply(x, (square + _EPS).rsqrt().view(shape), self.pulls, place, count)
        return normalised * (gamma * ratio.view(shape)) + beta


class _Normalised(torch.autograd.Function):
    """x/χ̄ with the gradient above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor, pulls: Tensor, place: int, count: int) -> Tensor:
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        ctx.pulls, ctx.place, ctx.count = pulls, place, count
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,), (y, inverse) = gradients, ctx.saved_tensors
        ctx.pulls[ctx.place] = (gradient * y).mean(_others(y))
        pull = ctx.pulls[: ctx.count].mean(0).view_as(inverse)
        return (gradient - y * pull) * inverse, None, None, None, None


class Centred(nn.Module):
    """Weight centralisation: every filter has mean 0."""

    def forward(self, weight: Tensor) -> Tensor:
        """The filters of a layer."""
        return weight - weight.flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))


def _others(x: Tensor) -> list[int]:
    """All dimensions but that of channels."""
    return [0, *range(2, x.dim())]
