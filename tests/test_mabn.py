"""Moving average batch normalisation is BatchNorm's arithmetic where its batches are all the same."""

from __future__ import annotations

import torch
from mabn import Centred, MovingAverageNorm
from torch import nn
from torch.nn.utils import parametrize


def batches(count: int) -> list[torch.Tensor]:
    """Noise whose channels have scales of their own."""
    torch.manual_seed(0)
    scale = torch.tensor([0.5, 1.0, 3.0]).double().view(3, 1, 1)
    return [scale * torch.randn(2, 3, 4, 5).double() for _ in range(count)]


def centred_batchnorm(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.batch_norm(x, None, None, training=True, eps=1e-5)


def test_it_is_batchnorm_on_one_centred_batch() -> None:
    norm = MovingAverageNorm(3).double()
    x = batches(1)[0]
    x = (x - x.mean((0, 2, 3), keepdim=True)).requires_grad_()
    y = norm(x)
    torch.testing.assert_close(y, centred_batchnorm(x))
    upstream = torch.randn_like(y)
    upstream -= upstream.mean((0, 2, 3), keepdim=True)  # then what BatchNorm's mean adds to the gradient is nothing
    (ours,) = torch.autograd.grad((y * upstream).sum(), x)
    (theirs,) = torch.autograd.grad((centred_batchnorm(x) * upstream).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_evaluation_uses_the_mean_second_moment_of_all_batches() -> None:
    norm, seen = MovingAverageNorm(3).double(), batches(12)
    for x in seen:
        norm(x)
    averages = [torch.stack([b.square().mean((0, 2, 3)) for b in seen[: n + 1]]).mean(0) for n in range(12)]
    expected = torch.stack(averages).mean(0)
    x = seen[0]
    torch.testing.assert_close(norm.eval()(x), x / (expected + 1e-5).sqrt().view(3, 1, 1))


def test_only_the_last_sixteen_batches_count() -> None:
    norm, seen = MovingAverageNorm(3).double(), batches(40)
    for x in seen:
        norm(x)
    torch.testing.assert_close(norm.recent.mean(0), torch.stack([b.square().mean((0, 2, 3)) for b in seen[-16:]]).mean(0))


def test_training_and_evaluation_agree_within_the_bound() -> None:
    """Renormalised by r, what training computes is what evaluation does."""
    norm, seen = MovingAverageNorm(3).double(), batches(20)
    for x in seen[:-1]:
        norm(x)
    y = norm(seen[-1])
    torch.testing.assert_close(y, norm.eval()(seen[-1]), rtol=1e-4, atol=1e-4)


def test_centred_filters_sum_to_zero_and_train() -> None:
    conv = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(conv, "weight", Centred())
    assert conv.weight.sum((1, 2, 3)).abs().max() < 1e-5
    conv(torch.randn(1, 3, 5, 5)).square().sum().backward()
    gradient = conv.parametrizations.weight.original.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    assert gradient.sum((1, 2, 3)).abs().max() < 1e-3
