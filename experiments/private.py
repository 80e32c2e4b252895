"""Private training on Fashion-MNIST: GroupNorm, no normaliser, and a converted network clipped in two ways.

    python experiments/private.py            # what isn't finished yet; a killed one continues
    python experiments/private.py --report   # the table from the runs that are there

The same for all: 20,000 images, Poisson sampling of 400 a step, five epochs, AdamW, δ = 1e-5. Rate and clipping norm are
chosen at ε = 3 on 5,000 validation images with the first seed, and kept for ε = 8. Images are standardised by constants, and
nothing is calibrated: no sample is looked at outside of the accounting. Fashion-MNIST comes from
$NORMPROP_DATA/fashion-mnist.npz or torchvision's download.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
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
MEAN, STD = 0.286, 0.353
KEYS = ("way", "epsilon", "rate", "clip", "seed")


def network(way: str) -> nn.Module:
    """Three convolutions of stride 2 and a linear layer."""
    layers: list[nn.Module] = []
    for inside, outside, size in ((1, 16, 5), (16, 32, 3), (32, 32, 3)):
        conv = nn.Conv2d(inside, outside, size, 2, size // 2, bias=way == "no normaliser")
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        norms = {"GroupNorm": [nn.GroupNorm(outside // 4, outside)], "no normaliser": []}
        layers += [conv, *norms.get(way, [nn.BatchNorm2d(outside)]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Standardised images and labels: training, validation, test."""
    images = load("fashion-mnist")
    x, x_test = ((t.float().reshape(-1, 1, 28, 28) / 255 - MEAN) / STD for t in (images.x_train, images.x_test))
    held_out = slice(TRAINED, TRAINED + HELD_OUT)
    return {
        "train": (x[:TRAINED], images.y_train[:TRAINED]),
        "validation": (x[held_out], images.y_train[held_out]),
        "test": (x_test, images.y_test),
    }


@functools.cache
def noise(epsilon: float) -> float:
    """The noise multiplier that spends ε in all epochs."""
    found: float = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=DELTA, sample_rate=BATCH / TRAINED, epochs=EPOCHS, accountant="prv"
    )
    return found


def train(sets: dict[str, tuple[Tensor, Tensor]], what: tuple[Any, ...]) -> dict[str, Any]:
    """One run: what it was, and what came of it."""
    way, epsilon, rate, clip, seed = what
    torch.manual_seed(seed)
    model = network(way)
    if way.endswith("Network"):
        model = normprop.convert(model, example=torch.zeros(1, 1, 28, 28)).train()
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


def chosen(runs: list[dict[str, Any]], way: str) -> dict[str, Any] | None:
    """The first seed's run that is best on validation images at the first ε."""
    mine = [run for run in runs if (run["way"], run["epsilon"], run["seed"]) == (way, EPSILONS[0], 0)]
    return max(mine, key=lambda run: run["validation"], default=None)


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: test accuracy over seeds with the chosen rate and clipping norm, and the first seed's elsewhere."""
    grid = [f"{rate:g}, {clip:g}" for rate, clip in itertools.product(RATES, CLIPS)]
    lines = [
        "| network | " + " | ".join(f"ε = {e:g}, %" for e in EPSILONS) + " | rate, norm | " + " | ".join(grid) + " |",
        "| --- | " + "---: | " * (len(EPSILONS) + 1 + len(grid)),
    ]
    for way in WAYS:
        best = chosen(runs, way)
        if best is None:
            continue
        cells = []
        for epsilon in EPSILONS:
            same = [r["test"] for r in runs if (r["way"], r["epsilon"]) == (way, epsilon)
                    and (r["rate"], r["clip"]) == (best["rate"], best["clip"])]  # fmt: skip
            spread = f" ± {statistics.stdev(same):.1f}" if len(same) > 1 else ""
            cells.append(f"{statistics.mean(same):.1f}{spread}" if same else "–")
        cells.append(f"{best['rate']:g}, {best['clip']:g}")
        for rate, clip in itertools.product(RATES, CLIPS):
            found = [r["test"] for r in runs if tuple(r[k] for k in KEYS) == (way, EPSILONS[0], rate, clip, 0)]
            cells.append(f"{found[0]:.1f}" if found else "–")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs = runs_file.read(options.out)
    if not options.report:
        warnings.filterwarnings("ignore")  # of Opacus: its random numbers are not secure, and hooks without input gradients
        torch.set_num_threads(1)
        sets = data()
        for rate, clip, way in itertools.product(RATES, CLIPS, WAYS):
            once(options.out, runs, sets, (way, EPSILONS[0], rate, clip, 0))
        for seed, epsilon, way in itertools.product(range(options.seeds), EPSILONS, WAYS):
            best = chosen(runs, way)
            if best is not None:
                once(options.out, runs, sets, (way, epsilon, best["rate"], best["clip"], seed))
    print(table(runs))


def once(out: Path, runs: list[dict[str, Any]], sets: Any, what: tuple[Any, ...]) -> None:
    """Do a run that isn't done, and write it down."""
    runs_file.once(out, runs, KEYS, what, lambda: train(sets, what))


if __name__ == "__main__":
    main()
