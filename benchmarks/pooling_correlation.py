"""Correlation of positions where pooling layers sit, in a small network on CIFAR-10 before and after training.

python benchmarks/pooling_correlation.py --steps 300
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def network(seed: int) -> nn.Sequential:
    """Six convolutions; a max pooling of 2 and one of 3, an average pooling of 2, a global average."""
    torch.manual_seed(seed)
    conv = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(
        *conv(3, 32), *conv(32, 32), nn.MaxPool2d(2), *conv(32, 64), nn.MaxPool2d(3, 2, 1), *conv(64, 64),
        nn.AvgPool2d(2), *conv(64, 128), *conv(128, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def correlation(x: Tensor, size: int) -> float:
    """The ρ for which the mean of a window of n positions has its measured variance ``v (1 + (n−1)ρ)/n``."""
    averaged = x.mean((2, 3)) if size == 0 else F.avg_pool2d(x, size, 1)
    count = x.shape[2] * x.shape[3] if size == 0 else size**2
    spread = lambda t: t.transpose(0, 1).flatten(1).var(1)
    ratio = spread(averaged).mean() / spread(x).mean()
    return float((ratio * count - 1) / (count - 1))


@torch.no_grad()
def measure(model: nn.Sequential, x: Tensor) -> list[tuple[str, float]]:
    found = []
    for layer in model:
        if "Pool" in type(layer).__name__:
            size = 0 if isinstance(layer, nn.AdaptiveAvgPool2d) else int(layer.kernel_size)
            found.append((type(layer).__name__ + (f" {size}×{size}" if size else " (all)"), correlation(x, size)))
        x = layer(x)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path.home() / ".cache" / "normprop" / "cifar10.npz")
    options = parser.parse_args()
    data = np.load(options.data)
    key_x, key_y = (next(k for k in data.files if "train" in k and part(data[k])) for part in
                    (lambda a: a.ndim > 2, lambda a: a.ndim == 1))  # fmt: skip
    images = torch.from_numpy(data[key_x][:20000]).float()
    images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    labels = torch.from_numpy(data[key_y][:20000]).long()
    for seed in range(options.seeds):
        model = network(seed).train()
        probe = images[:512]
        print(f"seed {seed}, untrained:", ", ".join(f"{n} {r:.2f}" for n, r in measure(model, probe)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=options.steps)
        for _ in range(options.steps):
            batch = torch.randint(len(images), (64,))
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        rows = measure(model, probe)
        print(
            f"seed {seed}, after {options.steps} steps (loss {loss.item():.2f}):", ", ".join(f"{n} {r:.2f}" for n, r in rows)
        )


if __name__ == "__main__":
    main()
