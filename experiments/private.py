"""Private training on Fashion-MNIST and CIFAR-10: GroupNorm, no normaliser, and a converted network clipped in two ways.

    python experiments/private.py                     # what isn't finished yet; a killed one continues
    python experiments/private.py --data cifar10      # one of the two
    python experiments/private.py --report            # the tables from the runs that are there

The same for all: 20,000 images, Poisson sampling of 400 a step, five epochs, AdamW, δ = 1e-5. Rate and clipping norm are
chosen at ε = 3 on 5,000 validation images with the first seed, and kept for ε = 8. Images are standardised by constants, and
nothing is calibrated: no sample is looked at outside of the accounting. The data come from $NORMPROP_DATA/fashion-mnist.npz
and cifar10.npz, or torchvision's download.
"""

from __future__ import annotations

import functools
import itertools
import time
import warnings
from pathlib import Path
from typing import Any

import runs_file
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from torch import Tensor, nn

import normprop
from normprop.integrations.opacus import PrivateNetwork, WholeNetwork
from normprop.lab.samples.datasets import load

OUT = Path(__file__).resolve().parent / "results" / "private" / "runs.jsonl"
WAYS = ("GroupNorm", "no normaliser", "PrivateNetwork", "WholeNetwork")
RATES, CLIPS, EPSILONS, SEEDS = (1e-3, 4e-3, 1.6e-2), (0.1, 1.0), (3.0, 8.0), 3
TRAINED, HELD_OUT, BATCH, EPOCHS, DELTA = 20000, 5000, 400, 5, 1e-5
# Of all pixels of each data set.
MEAN_AND_STD = {"fashion-mnist": (0.286, 0.353), "cifar10": (0.473, 0.252)}
KEYS = ("data", "way", "epsilon", "rate", "clip", "seed")


def network(way: str, channels: int) -> nn.Module:
    """Three convolutions of stride 2 and a linear layer, for images of 28 or 32 pixels."""
    layers: list[nn.Module] = []
    for inside, outside, size in ((channels, 16, 5), (16, 32, 3), (32, 32, 3)):
        conv = nn.Conv2d(inside, outside, size, 2, size // 2, bias=way == "no normaliser")
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        norms = {"GroupNorm": [nn.GroupNorm(outside // 4, outside)], "no normaliser": []}
        layers += [conv, *norms.get(way, [nn.BatchNorm2d(outside)]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


@functools.cache
def data(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Standardised images and labels: training, validation, test."""
    images, (mean, std) = load(name), MEAN_AND_STD[name]
    x, x_test = ((_planes(t).float() / 255 - mean) / std for t in (images.x_train, images.x_test))
    held_out = slice(TRAINED, TRAINED + HELD_OUT)
    return {
        "train": (x[:TRAINED], images.y_train[:TRAINED]),
        "validation": (x[held_out], images.y_train[held_out]),
        "test": (x_test, images.y_test),
    }


def _planes(x: Tensor) -> Tensor:
    """Images with their channels, one or three, in front: ``(N, C, H, W)``."""
    if x.dim() == 3:
        return x.unsqueeze(1)
    return x if x.shape[1] in (1, 3) else x.movedim(-1, 1)


@functools.cache
def noise(epsilon: float) -> float:
    """The noise multiplier that spends ε in all epochs."""
    found: float = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=DELTA, sample_rate=BATCH / TRAINED, epochs=EPOCHS, accountant="prv"
    )
    return found


def train(what: tuple[Any, ...]) -> dict[str, Any]:
    """One run: what it was, and what came of it."""
    name, way, epsilon, rate, clip, seed = what
    sets = data(name)
    torch.manual_seed(seed)
    image = sets["train"][0][:1]
    model = network(way, image.shape[1])
    if way.endswith("Network"):
        model = normprop.convert(model, example=torch.zeros_like(image)).train()
    module: nn.Module = {"PrivateNetwork": PrivateNetwork, "WholeNetwork": WholeNetwork}.get(way, lambda same: same)(model)
    trained = (p for p in (model if isinstance(module, PrivateNetwork) else module).parameters() if p.requires_grad)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, rate)
    if isinstance(module, PrivateNetwork):
        optimizer = module.optimizer(optimizer)
    engine, began = PrivacyEngine(), time.process_time()
    private, optimizer, loader = engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*sets["train"]), batch_size=BATCH),
        noise_multiplier=noise(epsilon),
        max_grad_norm=clip,
    )
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            optimizer.step()
    seconds = time.process_time() - began
    found = {name: accuracy(model, *sets[name]) for name in ("validation", "test")}
    spent = {"spent": round(engine.get_epsilon(DELTA), 4), "noise": noise(epsilon), "seconds": seconds}
    return dict(zip(KEYS, what, strict=True)) | found | spent


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of images classified correctly, in evaluation mode."""
    model.eval()
    return 100 * float(torch.cat([model(part).argmax(1) for part in x.split(500)]).eq(y).double().mean())


def table(runs: list[dict[str, Any]], name: str) -> str:
    """Markdown: test accuracy over seeds with the chosen rate and clipping norm, and the first seed's elsewhere."""
    runs = [run for run in runs if run["data"] == name]
    grid = [f"{rate:g}, {clip:g}" for rate, clip in itertools.product(RATES, CLIPS)]
    lines = [
        "| network | " + " | ".join(f"ε = {e:g}, %" for e in EPSILONS) + " | rate, norm | " + " | ".join(grid) + " |",
        "| --- | " + "---: | " * (len(EPSILONS) + 1 + len(grid)),
    ]
    for way in WAYS:
        best = runs_file.chosen(runs, way=way, epsilon=EPSILONS[0])
        if best is None:
            continue
        cells = [runs_file.over_seeds(runs, best | {"epsilon": epsilon}, KEYS) for epsilon in EPSILONS]
        cells.append(f"{best['rate']:g}, {best['clip']:g}")
        for rate, clip in itertools.product(RATES, CLIPS):
            cells.append(runs_file.first_seed(runs, way=way, epsilon=EPSILONS[0], rate=rate, clip=clip))
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = runs_file.parser(__doc__, OUT, SEEDS)
    parser.add_argument("--data", nargs="+", default=tuple(MEAN_AND_STD), choices=tuple(MEAN_AND_STD))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs = runs_file.read(options.out)
    if not options.report:
        warnings.filterwarnings("ignore")  # of Opacus: its random numbers are not secure, and hooks without input gradients
        torch.set_num_threads(1)

        def once(*what: Any) -> None:
            runs_file.once(options.out, runs, KEYS, what, lambda: train(what))

        for name in options.data:
            for rate, clip, way in itertools.product(RATES, CLIPS, WAYS):
                once(name, way, EPSILONS[0], rate, clip, 0)
            for seed, epsilon, way in itertools.product(range(options.seeds), EPSILONS, WAYS):
                best = runs_file.chosen(runs, data=name, way=way, epsilon=EPSILONS[0])
                if best is not None:
                    once(name, way, epsilon, best["rate"], best["clip"], seed)
    for name in options.data:
        print(f"{name}\n\n{table(runs, name)}\n")


if __name__ == "__main__":
    main()
