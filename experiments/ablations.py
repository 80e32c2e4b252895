"""What calibration, its directions and gradient clipping do to NormProp, at several rates: the table of docs/results.md.

python experiments/ablations.py             # what isn't finished yet, then the page; about fifteen minutes of one core
python experiments/ablations.py --report    # the page from the runs that are there
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
from pathlib import Path

import torch
from learning import PAGE, RESULTS, fill

from normprop.experiments import records
from normprop.experiments.datasets import load
from normprop.experiments.recipe import Recipe
from normprop.experiments.records import RUNS, Record
from normprop.experiments.workers import work

BASE = Recipe(data="cifar10", model="resnet8", batch_size=64, epochs=2, train_images=8000, validation=3000, dtype="bf16")
VARIANTS = {
    "NormProp, the default": {},
    "not calibrated": {"calibrate": 0},
    "calibrated on 64 images": {"calibrate": 64},
    "calibrated once": {"recalibrate": 0},
    "calibrated once, no directions": {"recalibrate": 0, "directions": 0},
    "no directions": {"directions": 0},
    "2 directions": {"directions": 2},
    "32 directions": {"directions": 32},
    "calibrated four times as often": {"recalibrate": 1600},
    "clipping at 0.02": {"clip": 0.02},
    "not clipped": {"clip": 0.0},
    "not clipped, no directions": {"directions": 0, "clip": 0.0},
    "not clipped, calibrated once": {"recalibrate": 0, "clip": 0.0},
    "not clipped, calibrated once, no directions": {"recalibrate": 0, "directions": 0, "clip": 0.0},
    "not clipped, not calibrated": {"calibrate": 0, "clip": 0.0},
    "input standardised by the batch": {"data_norm": "batch"},
    "BatchNorm": {"norm": "batch"},
    "BatchNorm, clipping at 0.05": {"norm": "batch", "clip": 0.05},
}
RATES = (0.1, 0.4)
SEEDS = (0, 1)


def recipe(variant: str, rate: float, seed: int) -> Recipe:
    return dataclasses.replace(BASE, lr=rate, seed=seed, **VARIANTS[variant]).resolved()


def cell(found: dict[Recipe, Record], variant: str, rate: float) -> str:
    done = [found[run] for seed in SEEDS if (run := recipe(variant, rate, seed)) in found]
    if not done:
        return "–"
    values = [100 * record.validation_accuracy for record in done]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(found: dict[Recipe, Record]) -> str:
    lines = [
        f"| validation accuracy, % | {' | '.join(f'rate {rate:g}' for rate in RATES)} |",
        f"|---|{'---:|' * len(RATES)}",
    ]
    lines += [f"| {name} | {' | '.join(cell(found, name, rate) for rate in RATES)} |" for name in VARIANTS]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs", "ablations"), help="where runs are kept")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    wanted = [recipe(variant, rate, seed) for seed in SEEDS for rate in RATES for variant in VARIANTS]
    if not options.report:
        torch.set_num_threads(1)
        work(wanted, options.out, images=load(BASE.data), device="cpu", finished=lambda: None)
    (RESULTS / "ablations").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(options.out / RUNS, RESULTS / "ablations" / RUNS)
    found = {record.recipe: record for record in records.read(options.out / RUNS)}
    PAGE.write_text(fill(PAGE.read_text(), {"ablations": table(found)}))


if __name__ == "__main__":
    main()
