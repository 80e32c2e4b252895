"""How much neighbouring positions of a feature map correlate, which pooling rules have to assume.

For every convolution of a BatchNorm network trained on CIFAR-10, after its ReLU: the correlation of two positions of a
channel, averaged over the pairs of a 2×2 window, a 3×3 window, and of the whole map.

python docs/images/window_correlation.py
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import normprop
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer
from normprop.lab.samples.datasets import load


def pairwise_correlation(maps: Tensor, size: int) -> float:
    """Mean correlation ρ of the pairs in windows, from Var(average of n) = v (1 + (n−1) ρ)/n."""
    n = size * size
    averages = nn.functional.avg_pool2d(maps, size, stride=1)
    ratio = averages.var(dim=(0, 2, 3)) / maps.var(dim=(0, 2, 3)).clamp(min=1e-12)
    return float((n * ratio.mean() - 1) / (n - 1))


def main() -> None:
    """Print a row a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    images = load(options.data)
    standardize = normprop.Standardize(normprop.InputStats.from_tensor(images.x_train))
    torch.manual_seed(0)
    network = build("plain12", shape=images.shape, classes=images.classes, norm=normalizer("batch"), width=0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(options.steps):
        batch = torch.randint(len(images.x_train), (64,))
        optimizer.zero_grad()
        x = standardize(images.x_train[batch])
        nn.functional.cross_entropy(network(x), images.y_train[batch]).backward()
        optimizer.step()
    network.eval()
    x = standardize(images.x_test[:512])
    print("layer    map    2×2    3×3  whole map")
    with torch.no_grad():
        layer = 0
        for module in network:
            x = module(x)
            if isinstance(module, nn.ReLU):
                layer += 1
                side = math.isqrt(x[0, 0].numel())
                found = [pairwise_correlation(x, size) for size in (2, 3, side)]
                print(f"{layer:5} {side:4}×{side:<2} " + " ".join(f"{value:6.2f}" for value in found))


if __name__ == "__main__":
    main()
