"""Semantic segmentation at 1 and 2 images a step: torchvision's LR-ASPP from scratch, with several normalisers.

    python experiments/segmentation.py                  # what isn't finished yet; a killed one continues
    python experiments/segmentation.py --report         # the table from the runs that are there

The same for all: scenes, their order, AdamW, rates, adaptive gradient clipping or none. Rate and clipping are chosen on
scenes of training material (validation); then --seeds runs of the best of each. Runs are kept in --out, one JSON line each.
Seconds are of processor time. Fashion-MNIST comes from $NORMPROP_DATA/fashion-mnist.npz or torchvision's download.
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
from rivals import CONVERTED, conversion, with_normalizer
from rivals import NAMES as RIVALS
from scenes import CLASSES, Scenes, intersections_over_unions, training_and_test
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import normprop
from normprop.optim import AdaptiveGradientClipping

# What is converted twice: `rivals.conversion` says how.
NAMES = (*CONVERTED, *RIVALS[1:])
RESULTS = Path(__file__).resolve().parent / "results" / "segmentation"
RATES, CLIPS = (1e-3, 3e-3), (0.0, 0.05)
SIZE, STEPS, MEASURED, EVALUATED = 96, 400, 16, 64
# Where the seeds of scenes begin: for measuring, validation, tests, and training.
_MEASURE, _VALIDATE, _TEST, _TRAIN = 10_000_000, 20_000_000, 30_000_000, 0


def train(norm: str, batch: int, rate: float, clip: float, seed: int, steps: int, size: int) -> dict[str, Any]:
    """One run: what it was, and what came of it."""
    training, test = training_and_test(size)
    torch.manual_seed(seed)
    samples, _ = training.batch(range(_MEASURE, _MEASURE + MEASURED))
    network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    model = with_normalizer(network, norm, samples).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    began = time.process_time()
    handle = None
    if norm in CONVERTED:
        handle = normprop.keep_calibrated(model, optimizer, samples, clip=clip, **conversion(norm)[1])
    elif clip:
        AdaptiveGradientClipping(optimizer, clip=clip)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)
    for step in range(steps):
        first = _TRAIN + seed * 1_000_000 + step * batch
        images, classes = training.batch(range(first, first + batch))
        loss = F.cross_entropy(model(images)["out"], classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - began
    return {
        "norm": norm, "batch": batch, "rate": rate, "clip": clip, "seed": seed, "steps": steps, "size": size,
        "loss": loss.item(), "seconds": seconds, "measuring": handle.seconds if handle else 0.0,
        "validation": mean_iou(model, training, _VALIDATE), "test": mean_iou(model, test, _TEST),
    }  # fmt: skip


@torch.no_grad()
def mean_iou(model: nn.Module, scenes: Scenes, first: int) -> float:
    """Mean IoU over classes in %, of a network in eval mode."""
    model.eval()
    pairs = []
    for start in range(first, first + EVALUATED, 16):
        images, classes = scenes.batch(range(start, start + 16))
        pairs.append((model(images)["out"].argmax(1), classes))
    predicted, truth = (torch.cat(part) for part in zip(*pairs, strict=True))
    return 100 * float(intersections_over_unions(predicted, truth).nanmean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "runs.jsonl")
    parser.add_argument("--norms", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs = runs_file.read(options.out)
    if not options.report:
        for batch in options.batches:
            for rate, clip, norm in itertools.product(options.rates, CLIPS, options.norms):
                once(options, runs, norm, batch, rate, clip, 0)
            for seed, norm in itertools.product(range(1, options.seeds), options.norms):
                best = chosen(runs, norm, batch)
                if best:
                    once(options, runs, norm, batch, best["rate"], best["clip"], seed)
    print(table(runs))


def once(options: argparse.Namespace, runs: list[dict[str, Any]], *what: Any) -> None:
    """Do a run that isn't done, and write it down."""
    if what[:2] == ("batch", 1):  # LR-ASPP's pooled branch has one value per channel: BatchNorm refuses it
        return
    keys = ("norm", "batch", "rate", "clip", "seed")
    runs_file.once(options.out, runs, keys, what, lambda: train(*what, options.steps, options.size))


def chosen(runs: list[dict[str, Any]], norm: str, batch: int) -> dict[str, Any] | None:
    """The run of the first seed that is best on validation scenes."""
    mine = [run for run in runs if (run["norm"], run["batch"], run["seed"]) == (norm, batch, 0)]
    return max(mine, key=lambda run: run["validation"], default=None)


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: test IoU of the chosen rate and clipping, over seeds."""
    lines = [
        "| batch | normaliser | test mIoU, % | rate | clip | seeds | not clipped, % | clipped, % |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for batch, norm in itertools.product(sorted({run["batch"] for run in runs}), NAMES):
        best = chosen(runs, norm, batch)
        if best is None:
            continue
        same = [r for r in runs if all(r[k] == best[k] for k in ("norm", "batch", "rate", "clip"))]
        found = [run["test"] for run in same]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        first = [[r["test"] for r in runs if _is_first(r, best, clip)] for clip in CLIPS]
        lines.append(
            f"| {batch} | {norm} | {statistics.mean(found):.1f}{spread} | {best['rate']:g} | {best['clip'] or '–'} "
            f"| {len(found)} | {' | '.join(f'{one[0]:.1f}' if one else '–' for one in first)} |"
        )
    return "\n".join(lines)


def _is_first(run: dict[str, Any], best: dict[str, Any], clip: float) -> bool:
    """Whether a run is the first seed's at the best rate, clipped so."""
    return (run["clip"], run["seed"]) == (clip, 0) and all(run[k] == best[k] for k in ("norm", "batch", "rate"))


if __name__ == "__main__":
    main()
