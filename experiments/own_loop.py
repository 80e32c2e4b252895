"""What `keep_calibrated` is worth in a plain loop: ResNet-8 at half width on CIFAR-10, AdamW and SGD.

    python experiments/own_loop.py            # what isn't finished yet; a killed one continues
    python experiments/own_loop.py --report   # the table from the runs that are there

The same for all: 4,000 images in the same order, 500 steps, one-cycle rates, adaptive clipping at 0.05 or none. Rate
and clipping are chosen on 2,000 validation images. CIFAR-10 comes from $NORMPROP_DATA/cifar10.npz or torchvision's download.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import runs_file
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normprop
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer
from normprop.lab.samples.datasets import load
from normprop.optim import AdaptiveGradientClipping

OUT = Path(__file__).resolve().parent / "results" / "own_loop" / "runs.jsonl"
NETWORKS = ("BatchNorm", "converted", "kept calibrated", "centred", "uncentred")
RATES = {("AdamW", 8): (1e-3, 3e-3), ("AdamW", 64): (1e-3,), ("SGD", 8): (0.03,)}
CLIPS, STEPS, TRAINED, HELD_OUT = (0.0, 0.05), 500, 4000, 2000
KEYS = ("network", "optimizer", "batch", "rate", "clip", "seed")


def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Standardised images and labels: training, validation, test."""
    images = load("cifar10")
    x, x_test = (t.float() / 255 for t in (images.x_train[: TRAINED + HELD_OUT], images.x_test[:HELD_OUT]))
    if x.shape[-1] == 3:
        x, x_test = x.movedim(-1, 1), x_test.movedim(-1, 1)
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    x, x_test, y = (x - mean) / std, (x_test - mean) / std, images.y_train
    return {
        "train": (x[:TRAINED], y[:TRAINED]),
        "validation": (x[TRAINED:], y[TRAINED : TRAINED + HELD_OUT]),
        "test": (x_test, images.y_test[:HELD_OUT]),
    }


def train(sets: dict[str, tuple[Tensor, Tensor]], what: tuple[Any, ...]) -> dict[str, Any]:
    """One run: what it was, and what came of it."""
    network, name, batch, rate, clip, seed = what
    torch.manual_seed(seed)
    x, y = sets["train"]
    model: nn.Module = build("resnet8", shape=tuple(x.shape[1:]), classes=10, norm=normalizer("batch"), width=0.5)
    if network != "BatchNorm":
        model = normprop.convert(model, example=x[:2], center=False if network == "uncentred" else "auto")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate) if name == "AdamW" else torch.optim.SGD(trained, rate, momentum=0.9)
    began = time.perf_counter()
    handle = None
    if network in ("kept calibrated", "centred", "uncentred"):
        options: Any = {"centred": {"center": False}, "uncentred": {"shrinkage": 0.1}}.get(network, {})
        handle = normprop.keep_calibrated(model, optimizer, x, clip=clip, **options)
    elif clip:
        AdaptiveGradientClipping(optimizer, clip=clip, up_to=0.1 if name == "SGD" else float("inf"))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS, cycle_momentum=False)
    model.train()
    for chosen in [c for _ in range(20) for c in torch.randperm(TRAINED)[: TRAINED // batch * batch].split(batch)][:STEPS]:
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    found = {name: accuracy(model, *sets[name]) for name in ("validation", "test")}
    measuring = handle.seconds if handle else 0.0
    return dict(zip(KEYS, what, strict=True)) | found | {"seconds": seconds, "measuring": measuring}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of images classified correctly, in evaluation mode."""
    model.eval()
    return 100 * float(torch.cat([model(part).argmax(1) for part in x.split(250)]).eq(y).double().mean())


def chosen(runs: list[dict[str, Any]], network: str, name: str, batch: int) -> dict[str, Any] | None:
    """The first seed's run that is best on validation images."""
    mine = [r for r in runs if (r["network"], r["optimizer"], r["batch"], r["seed"]) == (network, name, batch, 0)]
    return max(mine, key=lambda run: run["validation"], default=None)


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: test accuracy of the chosen rate and clipping over seeds, and the first seed's elsewhere."""
    lines = [
        "| optimizer, batch | network | test, % | rate, clip | no clip, % (each rate) | clip 0.05, % |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (name, batch), network in itertools.product(RATES, NETWORKS):
        best = chosen(runs, network, name, batch)
        if best is None:
            continue
        same = [r["test"] for r in runs if all(r[k] == best[k] for k in KEYS[:-1])]
        spread = f" ± {statistics.stdev(same):.1f}" if len(same) > 1 else ""
        cells = []
        for clip in CLIPS:
            settings = [(network, name, batch, rate, clip, 0) for rate in RATES[name, batch]]
            found = [r["test"] for s in settings for r in runs if tuple(r[k] for k in KEYS) == s]
            cells.append(" ".join(f"{value:.1f}" for value in found))
        lines.append(
            f"| {name}, {batch} | {network} | {statistics.mean(same):.1f}{spread} | {best['rate']:g}, "
            f"{best['clip'] or '–'} | {cells[0]} | {cells[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs = runs_file.read(options.out)
    if not options.report:
        sets = data()
        for (name, batch), rates in RATES.items():
            for rate, clip, network in itertools.product(rates, CLIPS, NETWORKS):
                once(options.out, runs, sets, (network, name, batch, rate, clip, 0))
        for seed, (name, batch), network in itertools.product(range(1, options.seeds), RATES, NETWORKS):
            best = chosen(runs, network, name, batch)
            if best is not None:
                once(options.out, runs, sets, (network, name, batch, best["rate"], best["clip"], seed))
    print(table(runs))


def once(out: Path, runs: list[dict[str, Any]], sets: Any, what: tuple[Any, ...]) -> None:
    """Do a run that isn't done, and write it down."""
    runs_file.once(out, runs, KEYS, what, lambda: train(sets, what))


if __name__ == "__main__":
    main()
