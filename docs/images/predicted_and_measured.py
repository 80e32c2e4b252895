"""Predicted against measured standard deviation of every layer, drawn as predicted_and_measured.png beside this file.

A plain network of 11 convolutions without skips, half as wide as `plain12`, on CIFAR-10: as `convert` leaves it, without
centring, calibrated on 256 images with and without directions, after training, and calibrated again in the midst of it.
Measured on 512 test images, which took no part in any of it.

python docs/images/predicted_and_measured.py           # about five minutes on one core
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

import normprop
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer
from normprop.lab.samples.datasets import load
from normprop.optim import AdaptiveGradientClipping

STEPS = 300
AGAIN = 80


def before_activations(model: nn.Module, x: Tensor) -> list[normprop.inspection.report.Row]:
    """What goes into each ReLU."""
    rows = list(normprop.inspect(model, x))
    return [row for row, after in itertools.pairwise(rows) if after.operation == "ReLU"]


def ratios(model: nn.Module, x: Tensor) -> list[float]:
    """Measured over predicted standard deviation, rms over channels."""
    rows = before_activations(model, x)
    return [(row.measured.var.mean() / row.predicted.var.mean()).sqrt().item() for row in rows]


def offsets(model: nn.Module, x: Tensor) -> list[float]:
    """Measured minus predicted mean, rms over channels, over the predicted standard deviation."""
    return [
        ((row.measured.mean - row.predicted.mean).square().mean() / row.predicted.var.mean()).sqrt().item()
        for row in before_activations(model, x)
    ]


def train(model: nn.Module, x: Tensor, y: Tensor, *, every: int = 0) -> nn.Module:
    """A copy after `STEPS` steps of SGD, batch size 64, rate 0.1, clipping 0.05; calibrated again after `every` of them."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    AdaptiveGradientClipping(optimizer, clip=0.05)
    order = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        if every and step and step % every == 0:
            chosen = torch.randint(len(x), (256,), generator=order)
            normprop.recalibrate(model, optimizer, x[chosen])
        batch = torch.randint(len(x), (64,), generator=order)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent."""
    return 100 * float((torch.cat([model(part).argmax(1) for part in x.split(500)]) == y).double().mean())


def series(data: str, seed: int) -> dict[str, list[float]]:
    """Ratios per layer of every variant; prints the rest."""
    images = load(data).subset(20000)
    standardize = normprop.Standardize(normprop.InputStats.from_tensor(images.x_train))
    x, y = standardize(images.x_train), images.y_train
    test, unseen = (standardize(images.x_test[:2000]), images.y_test[:2000]), standardize(images.x_test[:512])
    torch.manual_seed(seed)
    network = build("plain12", shape=images.shape, classes=images.classes, norm=normalizer("batch"), width=0.5)
    variants = {"not centred": normprop.convert(network, center=False), "centred": normprop.convert(network)}
    for label, directions in (("calibrated, no directions", 0), ("calibrated", 8)):
        variants[label] = normprop.calibrate(copy.deepcopy(variants["centred"]), x[:256], directions=directions)
    found = {}
    for label, model in variants.items():
        found[label] = ratios(model, unseen)
        trained = train(model, x, y)
        found[f"{label}, {STEPS} steps"] = ratios(trained, unseen)
        print(f"{label:26} offset of the mean " + " ".join(f"{value:5.2f}" for value in offsets(model, unseen)))
        print(f"{label:26} test accuracy after {STEPS} steps {accuracy(trained, *test):.1f} %", flush=True)
    trained = train(variants["calibrated"], x, y, every=AGAIN)
    found[f"and every {AGAIN} steps, {STEPS} steps"] = ratios(trained, unseen)
    print(f"calibrated every {AGAIN} steps: test accuracy after {STEPS} steps {accuracy(trained, *test):.1f} %", flush=True)
    return found


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Lines over layers, on a logarithmic scale on which 1 is a prediction that holds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    styles = [
        (colour, marker, line)
        for colour, marker in zip(("#555555", "#0072B2", "#E69F00", "#D55E00"), "soD^", strict=True)
        for line in ("-", "--")
    ] + [("#D55E00", "v", ":")]
    for (label, values), (colour, marker, style) in zip(found.items(), styles, strict=True):
        layers = range(1, len(values) + 1)
        axes.plot(layers, values, color=colour, marker=marker, linestyle=style, linewidth=1.6, markersize=4, label=label)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.set_xticks(range(1, 12))
    axes.set_xlabel("layer")
    axes.set_ylabel("measured / predicted std")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def main() -> None:
    """Print the figures and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    found = series(options.data, options.seed)
    print("measured / predicted std   " + " ".join(f"{layer:>5}" for layer in range(1, 12)))
    for label, values in found.items():
        print(f"{label:26} " + " ".join(f"{value:5.2f}" for value in values))
    draw(found, options.out)


if __name__ == "__main__":
    main()
