"""Fine-tune a trained BatchNorm network one image at a time, without losing what it knows.

A ResNet-8 learns half of the classes with BatchNorm at batch size 64. Then the task shifts: the other classes, on
inverted images, and memory for one or two images at a time. Compared, with the same images in the same order:

    converted            normprop.convert keeps the trained function and trains at batch size 1
    BatchNorm, batch 2   batch statistics of two images
    BatchNorm, batch 1   batch statistics of one image
    frozen BatchNorm     eval mode: the old task's statistics as constants, batch size 1

    python examples/finetune_batch_size_1.py                 # scikit-learn's digits, about three minutes on one core
    python examples/finetune_batch_size_1.py --data cifar10  # $NORMPROP_DATA/cifar10.npz or torchvision's download
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normprop
from normprop.data import InputStats, Standardize
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer
from normprop.lab.samples.datasets import load
from normprop.optim import AdaptiveGradientClipping


@dataclass
class Task:
    """Images of some classes, standardised, in two sets."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def tasks(data: str, limit: int) -> tuple[Task, Task]:
    """The first half of the classes as they are; the second half inverted, standardised as the first half was."""
    images = load(data)
    half = images.classes // 2

    def choose(x: Tensor, y: Tensor, second: bool) -> tuple[Tensor, Tensor]:
        chosen = torch.where((y >= half) if second else (y < half))[0][:limit]
        return x[chosen], y[chosen] - half * second

    old = Task(*choose(images.x_train, images.y_train, False), *choose(images.x_test, images.y_test, False))
    new = Task(*choose(images.x_train, images.y_train, True), *choose(images.x_test, images.y_test, True))
    standardize = Standardize(InputStats.from_tensor(old.x_train))
    old.x_train, old.x_test = standardize(old.x_train), standardize(old.x_test)
    new.x_train, new.x_test = -standardize(new.x_train), -standardize(new.x_test)
    return old, new


def fit(model: nn.Module, task: Task, *, batch_size: int, rate: float, epochs: int, seed: int) -> float:
    """One-cycle SGD with adaptive gradient clipping, in the model's current mode; returns seconds."""
    start = time.perf_counter()
    steps = epochs * (len(task.x_train) // batch_size)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=rate, momentum=0.9)
    AdaptiveGradientClipping(optimizer, clip=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        shuffled = torch.randperm(len(task.x_train), generator=order)
        for batch in shuffled[: len(shuffled) // batch_size * batch_size].split(batch_size):
            loss = nn.functional.cross_entropy(model(task.x_train[batch]), task.y_train[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """Percent of the test images, in eval mode, which is how a network is used."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(*_split(task.x_test, task.y_test), strict=True))
    return 100 * right / len(task.y_test)


def _split(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(500) for tensor in tensors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, cifar10, or any other data set normprop train knows")
    parser.add_argument("--limit", type=int, default=5000, help="training images a task at most")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03], help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each setting")
    parser.add_argument("--width", type=float, default=1.0, help="factor on the number of channels")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.limit, options.rates, options.seeds, options.width = 64, [0.003], 1, 0.25

    old, new = tasks(options.data, options.limit)
    torch.manual_seed(0)
    shape, classes = tuple(old.x_train.shape[1:]), int(old.y_train.max()) + 1
    trained = build("resnet8", shape=shape, classes=classes, norm=normalizer("batch"), width=options.width)
    fit(trained.train(), old, batch_size=min(64, len(old.x_train)), rate=0.1, epochs=8, seed=0)
    print(f"BatchNorm network on the first task: {accuracy(trained, old):.1f} % of {len(old.y_test)} test images")

    converted = normprop.convert(trained.eval())
    with torch.no_grad():
        x = old.x_test[:100]
        change = float((converted(x) - trained(x)).abs().max() / trained(x).abs().max())
    print(f"The converted network computes the same: largest relative difference of a score {change:.0e}\n")

    settings = (
        ("converted, batch 1", converted, True, 1),
        ("BatchNorm, batch 2", trained, True, 2),
        ("BatchNorm, batch 1", trained, True, 1),
        ("frozen BatchNorm, batch 1", trained, False, 1),
    )
    print(f"Second task, {len(new.x_train)} images seen once, test accuracy in % over {options.seeds} seeds (least–most)")
    print(f"{'':27}" + "".join(f"{f'rate {rate:g}':>20}" for rate in options.rates) + f"{'ms a step':>12}")
    for label, start, training, batch_size in settings:
        cells, seconds = [], []
        for rate in options.rates:
            found = []
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                model = copy.deepcopy(start)
                model.fc = nn.Linear(model.fc.in_features, classes)  # new classes
                model.train(training)
                seconds.append(fit(model, new, batch_size=batch_size, rate=rate, epochs=1, seed=seed))
                found.append(accuracy(model, new))
                if start is converted:
                    last = model
            cells.append(f"{statistics.mean(found):.1f} ({min(found):.1f}–{max(found):.1f})")
        steps = len(new.x_train) // batch_size
        print(f"{label:27}" + "".join(f"{cell:>20}" for cell in cells) + f"{1e3 * min(seconds) / steps:>12.1f}")

    folded = normprop.fold(last)
    with torch.no_grad():
        x = new.x_test[:100]
        change = float((folded(x) - last(x)).abs().max() / last(x).abs().max())
    ours = {type(m).__module__ for m in folded.modules() if type(m).__module__.startswith("normprop")}
    print(f"\nFolded for deployment: relative difference {change:.0e}, modules of normprop left: {len(ours)}")


if __name__ == "__main__":
    main()
