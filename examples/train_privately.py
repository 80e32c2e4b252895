"""Train under differential privacy with Opacus: a network with GroupNorm, and one with BatchNorm, converted.

    python examples/train_privately.py          # scikit-learn's digits, less than a minute on one core

Both are given the same privacy budget, rate and clipping norm. Nothing is calibrated: constants come from no data.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normprop
from normprop.integrations.opacus import PrivateNetwork

DELTA = 1e-4


def network(norm: str) -> nn.Module:
    """Three convolutions and a linear layer."""
    layers: list[nn.Module] = []
    for inside, outside, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        conv = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        layers += [conv, nn.GroupNorm(4, outside) if norm == "GroupNorm" else nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--norm", type=float, default=1.0, help="length to which each sample's gradient is clipped")
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it runs")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of Opacus: random numbers that are not secure, hooks without gradients of the input

    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train_set, test_set = order[:-360], order[-360:]
    for label in ("GroupNorm", "converted"):
        torch.manual_seed(0)
        epochs = 1 if options.quick else options.epochs
        model = network(label)
        if label == "converted":
            model = normprop.convert(model, example=x[:2]).train()
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), options.rate)
        module = model
        if label == "converted":  # these two lines, and all is as with any network
            module = PrivateNetwork(model)
            optimizer = module.optimizer(optimizer)
        engine = PrivacyEngine()
        private, optimizer, loader = engine.make_private_with_epsilon(
            module=module,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(x[train_set], y[train_set]), batch_size=128),
            target_epsilon=options.epsilon,
            target_delta=DELTA,
            epochs=epochs,
            max_grad_norm=options.norm,
        )
        began = time.perf_counter()
        train(private, optimizer, loader, epochs)
        seconds = time.perf_counter() - began
        with torch.no_grad():
            right = (model.eval()(x[test_set]).argmax(1) == y[test_set]).double().mean()
        spent, step = engine.get_epsilon(DELTA), 1e3 * seconds / len(loader) / epochs
        print(f"{label:9} {100 * right:.1f} % of 360 test images, ε = {spent:.2f} at δ = {DELTA:g}, {step:.1f} ms a step")


def train(private: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """Nothing but the usual."""
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
