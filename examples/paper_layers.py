"""A network of the paper's own layers (eqs 9, 11, 12), trained at batch size 1 on scikit-learn's digits.

Each layer is convolution with unit filters, γ, β, activation and standardisation in one. Filters are kept at unit length
after every step, as the paper does.

python examples/paper_layers.py
python examples/paper_layers.py --method exact --activation gelu
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import normprop
from normprop.data import InputStats, Standardize
from normprop.lab.samples.datasets import load
from normprop.nn import Conv2d, Linear
from normprop.optim import UnitNormProjection


def network(method: str, activation: str) -> nn.Sequential:
    """Three convolutions and an output layer that is linear and not standardised."""
    options = {"padding": 1, "activation": activation, "method": method}
    return nn.Sequential(
        Conv2d(1, 32, 3, **options),
        Conv2d(32, 32, 3, stride=2, **options),
        Conv2d(32, 64, 3, stride=2, **options),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Linear(64, 10, activation=None),
    )


def layer_statistics(model: nn.Sequential, x: Tensor) -> list[tuple[str, float, float]]:
    """Name, mean and standard deviation of each normalised layer's output."""
    rows = []
    with torch.no_grad():
        for name, layer in model.named_children():
            x = layer(x)
            if isinstance(layer, Conv2d):
                rows.append((name, float(x.mean()), float(x.std())))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("paper", "exact"), default="paper")
    parser.add_argument("--activation", default="relu", help="any name that normprop.moments knows")
    parser.add_argument("--rate", type=float, default=0.002)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()

    images = load("digits")
    standardize = Standardize(InputStats.from_tensor(images.x_train))
    x_train, x_test = standardize(images.x_train), standardize(images.x_test)
    torch.manual_seed(0)
    model = network(options.method, options.activation)
    print(f"γ starts at {model[0].gain[0].item():.4f}; mean and std of each layer's output on the test images:")
    for name, mean, std in layer_statistics(model, x_test):
        print(f"  layer {name}: {mean:6.3f}  {std:.3f}")

    optimizer = torch.optim.SGD(model.parameters(), lr=options.rate, momentum=0.9, weight_decay=5e-4)
    UnitNormProjection(optimizer, model)
    for epoch in range(1 if options.quick else options.epochs):
        order = torch.randperm(len(x_train))[: 20 if options.quick else None]
        for i in order:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_train[i : i + 1]), images.y_train[i : i + 1]).backward()
            optimizer.step()
        with torch.no_grad():
            right = float((model(x_test).argmax(1) == images.y_test).double().mean())
        print(f"epoch {epoch + 1}: {100 * right:.1f} % of {len(x_test)} test images, trained one image at a time")

    folded = normprop.fold(model)
    with torch.no_grad():
        print(f"folded to plain torch: largest difference {float((folded(x_test) - model(x_test)).abs().max()):.0e}")


if __name__ == "__main__":
    main()
