"""A plain AdamW loop with tiny batches: a BatchNorm network, and the same converted and kept calibrated.

python examples/train_adamw.py          # scikit-learn's digits, less than a minute on one core
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import normprop


def network() -> nn.Module:
    """Six convolutions, each with a BatchNorm, and a linear layer."""
    layers: list[nn.Module] = []
    for inside, outside, stride in ((1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        conv = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, *, batch: int, steps: int) -> None:
    """Nothing but the usual."""
    rate = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args()
    steps = 20 if options.quick else options.steps

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    x, y = (x - x.mean()) / x.std(), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train_set, test_set = order[:-360], order[-360:]
    for label, batch in (("BatchNorm", 2), ("converted", 2), ("converted", 1)):
        torch.manual_seed(0)
        model = network() if label == "BatchNorm" else normprop.convert(network(), example=x[:2])
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
        handle = None
        if label == "converted":
            handle = normprop.keep_calibrated(model, optimizer, x[train_set])
        began = time.perf_counter()
        train(model, optimizer, x[train_set], y[train_set], batch=batch, steps=steps)
        seconds = time.perf_counter() - began
        with torch.no_grad():
            right = (model.eval()(x[test_set]).argmax(1) == y[test_set]).double().mean()
        print(f"{label:9} batch {batch}: {100 * right:.1f} % of 360 test images, {1e3 * seconds / steps:.1f} ms a step")
        if handle is not None:
            print(f"          {handle}")


if __name__ == "__main__":
    main()
