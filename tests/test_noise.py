"""Networks that draw random numbers in their own forward: masks written out, and noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normprop

Mix = Callable[[Tensor], Tensor]


def connect(x: Tensor) -> Tensor:
    return x / 0.7 * torch.floor(0.7 + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device))


def compared(x: Tensor) -> Tensor:
    mask = torch.rand(x.shape[:2], device=x.device) < 0.8
    return x * mask[:, :, None, None].to(x.dtype) / 0.8


def filled(x: Tensor) -> Tensor:
    mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.9)
    mask.div_(0.9)
    return x * mask


def chances(x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.full_like(x[:, :1, :1, :1], 0.6)) / 0.6


def noisy(x: Tensor) -> Tensor:
    return x + 0.4 * torch.randn_like(x)


def gaussian_factor(x: Tensor) -> Tensor:
    return x * torch.normal(1.0, 0.3, x.shape, device=x.device)


MIXES = (connect, compared, filled, chances, noisy, gaussian_factor)


class Net(nn.Module):
    """Two blocks with something random between them."""

    def __init__(self, mix: Mix, *, always: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.last = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.mix, self.always = mix, always

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.last(self.second(self.mix(x) if self.training or self.always else x))


def effective(model: nn.Module) -> Tensor:
    """The effective weight with which the second layer runs."""
    found: list[Tensor] = []
    handle = model.second.register_forward_pre_hook(lambda layer, _: found.append(layer.weight.detach().clone()))
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    handle.remove()
    return found[0]


@pytest.mark.parametrize("mix", MIXES)
def test_noise_of_training_leaves_the_lane_as_it_is(mix: Mix) -> None:
    """As with dropout: training and evaluation run with the same effective weights."""
    torch.manual_seed(0)
    model = normprop.convert(Net(mix).double())
    torch.testing.assert_close(effective(model.train()), effective(model.eval()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mix", MIXES)
def test_samples_are_independent_under_the_same_draw(mix: Mix) -> None:
    torch.manual_seed(1)
    model = normprop.convert(Net(mix).double()).train()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    draws = []
    for batch in (x, torch.cat([x, 5 + torch.randn(3, 3, 8, 8, dtype=torch.float64)])):
        torch.manual_seed(2)
        draws.append(model(batch)[:1])
    if mix in (connect, filled, chances):  # one number a sample, so that the first sample draws the same
        torch.testing.assert_close(draws[0], draws[1], rtol=1e-10, atol=1e-12)
    assert all(bool(d.isfinite().all()) for d in draws)


@pytest.mark.parametrize("mix", MIXES)
def test_noise_of_both_modes_counts(mix: Mix) -> None:
    """The layer behind it gives what the variance of its noisy input asks for: that of the rules, which sampling tests."""
    torch.manual_seed(3)
    quiet = normprop.convert(Net(mix).double(), center=False)
    noisy = normprop.convert(Net(mix, always=True).double(), center=False)
    noisy.load_state_dict({k: v for k, v in quiet.state_dict().items() if "record" not in k}, strict=False)
    rectified = normprop.moments("relu", torch.zeros((), dtype=torch.float64), 1.0)
    with torch.no_grad():
        sample = rectified.mean + rectified.var.sqrt() * torch.randn(20_000, 6, 2, 2, dtype=torch.float64)
        growth = (mix(sample).var() / rectified.var).sqrt()
    assert growth > 1.05
    torch.testing.assert_close(effective(quiet.eval()) / growth, effective(noisy.eval()), rtol=0.02, atol=0)


@pytest.mark.parametrize("mix", MIXES)
def test_trained_networks_keep_their_function_and_fold(mix: Mix) -> None:
    torch.manual_seed(4)
    net = Net(mix).double()
    for module in (net.norm, net.last):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    net.eval()
    model, x = normprop.convert(net), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), net(x), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(normprop.fold(model)(x), net(x), rtol=1e-8, atol=1e-10)
    model.train()(x[:1]).square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_predictions_in_training_count_masks() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU())

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net

        def forward(self, x: Tensor) -> Tensor:
            return connect(self.body(x))

    report = normprop.propagate(Masked().double().train())
    (before,) = (row for row in report if row.operation == "ReLU")
    *_, after = report
    m, v = before.predicted.mean, before.predicted.var
    torch.testing.assert_close(after.predicted.mean, m)
    torch.testing.assert_close(after.predicted.var, (v + 0.3 / 0.7 * (v + m.square())))
