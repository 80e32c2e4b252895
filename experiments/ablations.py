"""What each part of the default is worth, and what else was tried: the tables of docs/laboratory.md.

    python experiments/ablations.py                        # what isn't finished yet, then the page; a killed one continues
    python experiments/ablations.py --only regularisation  # one table alone
    python experiments/ablations.py --report               # the page from the runs that are there

A run takes ten seconds to a minute of one core; several such commands share the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from group_noise import GroupNoise
from learning import PAGE, RESULTS
from treatments import (
    BatchNoise,
    BranchGain,
    GainDecay,
    Treated,
    Treatment,
    Uncentred,
    learned_proxies,
    projected,
    untreated,
)

from normprop.lab.comparison import records
from normprop.lab.comparison.records import RUNS, Record
from normprop.lab.comparison.workers import work
from normprop.lab.pages.marked_page import filled
from normprop.lab.samples.datasets import load
from normprop.lab.samples.images import Images
from normprop.lab.training.recipe import Recipe, rate_at

TREATMENTS: dict[str, Treatment] = {
    "untreated": untreated,
    "uncentred": Uncentred(),
    "uncentred-stem": Uncentred(("conv",)),
    "uncentred-skips": Uncentred(("stages.1.0.skip.0", "stages.2.0.skip.0")),
    "branches-at-0": BranchGain(0.0),
    "branches-scaled": BranchGain(),
    "projected": projected,
    "proxies": learned_proxies,
    "noise-64": BatchNoise(64),
    "noise-256": BatchNoise(256),
    "noise-1024": BatchNoise(1024),
    "group-64": GroupNoise(64),
    "group-256": GroupNoise(256, groups=4),
    "gains-32": GainDecay(32),
    "gains-128": GainDecay(128),
    "gains-512": GainDecay(512),
}


@dataclass(frozen=True)
class Variant:
    """A row of a table.

    Attributes:
        title: What the table calls it.
        changes: To the study's recipe.
        treat: A name of `TREATMENTS`.
    """

    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    treat: str = "untreated"


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        base: The recipe of the first row.
        columns: Heading of each column, and its changes to the recipe.
        variants: The rows.
        seeds: Of each cell.
        loss: Whether to show the loss of the last epoch of training besides validation accuracy.
    """

    base: Recipe
    columns: dict[str, dict[str, Any]]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1)
    loss: bool = False

    def runs(self) -> list[tuple[str, Recipe]]:
        """Treatment and recipe of every run, whole tables of one seed after the other."""
        return [(v.treat, self.recipe(v, c, s)) for s in self.seeds for v in self.variants for c in self.columns]

    def recipe(self, variant: Variant, column: str, seed: int) -> Recipe:
        """Of one run."""
        changes = {**self.columns[column], **variant.changes, "seed": seed}
        return dataclasses.replace(self.base, **changes).resolved()


_SHORT = Recipe(
    data="cifar10", model="resnet8", batch_size=64, epochs=2, train_images=8000, validation=3000, dtype="bf16",
    keep_calibrated=False,
)  # fmt: skip
_RESNET20 = dataclasses.replace(_SHORT, model="resnet20", epochs=3, train_images=10_000, validation=5000, clip=0.05)
_RATES = {"rate 0.1": {"lr": 0.1}, "rate 0.4": {"lr": 0.4}}
_WIDE_RATES = {"rate 0.1": {"lr": 0.1}, "rate 0.9": {"lr": 0.9}}
_BATCH = {"norm": "batch", "clip": 0.0}
STUDIES = {
    "calibration": Study(
        _SHORT,
        _RATES,
        (
            Variant("the default"),
            Variant("not calibrated", {"calibrate": 0}),
            Variant("calibrated once", {"recalibrate": 0}),
            Variant("no directions", {"directions": 0}),
            Variant("2 directions", {"directions": 2}),
            Variant("32 directions", {"directions": 32}),
            Variant("8 directions counted by 0.3", {"shrinkage": 0.7}),
            Variant("8 directions counted whole", {"shrinkage": 0.0}),
            Variant("clipping at 0.02", {"clip": 0.02}),
            Variant("not clipped", {"clip": 0.0}),
            Variant("not clipped, directions counted by 0.1", {"shrinkage": 0.9, "clip": 0.0}),
            Variant("not clipped, no directions", {"directions": 0, "clip": 0.0}),
            Variant("not clipped, calibrated once", {"recalibrate": 0, "clip": 0.0}),
            Variant("not clipped, not calibrated", {"calibrate": 0, "clip": 0.0}),
            Variant("BatchNorm", _BATCH),
            Variant("BatchNorm, clipping at 0.05", {"norm": "batch", "clip": 0.05}),
        ),
    ),
    "remedies": Study(
        _SHORT,
        _RATES,
        (
            Variant("the default"),
            Variant("no layer centred", treat="uncentred"),
            Variant("all centred but the first", treat="uncentred-stem"),
            Variant("all centred but the 1×1 convolutions of skips", treat="uncentred-skips"),
            Variant("last γ of a branch starts at 0", treat="branches-at-0"),
            Variant("last γ of a branch starts at 1/√3", treat="branches-scaled"),
            Variant("filters projected to unit length", treat="projected"),
            Variant("learned proxies", treat="proxies"),
            Variant("learned proxies, calibrated once", {"recalibrate": 0}, "proxies"),
            Variant("no warm-up", {"schedule": "cosine"}),
            Variant("no warm-up, not clipped", {"schedule": "cosine", "clip": 0.0}),
            Variant("BatchNorm", _BATCH),
            Variant("BatchNorm, last γ of a branch starts at 0", _BATCH, "branches-at-0"),
            Variant("BatchNorm, no warm-up", {**_BATCH, "schedule": "cosine"}),
        ),
    ),
    "projection": Study(
        _RESNET20,
        _WIDE_RATES,
        (Variant("the default"), Variant("filters projected to unit length", treat="projected")),
    ),
    "shift": Study(
        _RESNET20,
        _WIDE_RATES,
        (
            Variant("the default"),
            Variant("β starts at 0", {"beta": 0.0}),
            Variant("β starts at 1", {"beta": 1.0}),
            Variant("BatchNorm", {"norm": "batch"}),
            Variant("BatchNorm, β starts at ½", {"norm": "batch", "beta": 0.5}),
        ),
    ),
    "shallow": Study(
        _SHORT,
        {
            "ResNet-8, batch size 1": {
                "batch_size": 1,
                "lr": rate_at(1, 0.1),
                "train_images": 4000,
                "validation": 2000,
                "dtype": "float32",
            },
            "the paper's network ×0.25": {
                "model": "nin",
                "width": 0.25,
                "lr": 0.3,
                "epochs": 3,
                "train_images": 20_000,
                "validation": 5000,
            },
        },
        (
            Variant("the default"),
            Variant("β starts at ½", {"beta": 0.5}),
            Variant("β starts at 1", {"beta": 1.0}),
        ),
    ),
    "regularisation": Study(
        dataclasses.replace(_SHORT, epochs=20, train_images=2000),
        {"rate 0.2": {"lr": 0.2}},
        (
            Variant("the default"),
            Variant("input standardised by the batch", {"data_norm": "batch"}),
            Variant("noise of 64 values", treat="noise-64"),
            Variant("noise of 256 values", treat="noise-256"),
            Variant("noise of 1024 values", treat="noise-1024"),
            Variant("noise of groups of 64 images", treat="group-64"),
            Variant("noise of groups of 256 images", treat="group-256"),
            Variant("decay of γ as of batches of 32", treat="gains-32"),
            Variant("decay of γ as of batches of 128", treat="gains-128"),
            Variant("decay of γ as of batches of 512", treat="gains-512"),
            Variant("drop-path 0.1", {"model": "drop_path:resnet8"}),
            Variant("weight decay 0.002", {"weight_decay": 2e-3}),
            Variant("weight decay 0.008", {"weight_decay": 8e-3}),
            Variant("flips and crops", {"flips": True, "crops": 4}),
            Variant("BatchNorm", _BATCH),
            Variant("BatchNorm, decay of γ as of batches of 128", _BATCH, "gains-128"),
            Variant("BatchNorm, drop-path 0.1", {**_BATCH, "model": "drop_path:resnet8"}),
            Variant("BatchNorm, weight decay 0.002", {**_BATCH, "weight_decay": 2e-3}),
            Variant("BatchNorm, weight decay 0.008", {**_BATCH, "weight_decay": 8e-3}),
            Variant("BatchNorm, flips and crops", {**_BATCH, "flips": True, "crops": 4}),
        ),
        loss=True,
    ),
}


def file_of(folder: Path, study: str, treat: str) -> Path:
    """Where the runs of a study with one treatment are kept: a recipe alone doesn't tell them apart."""
    return folder / study / treat / RUNS


def cell(done: list[Record], *, loss: bool) -> str:
    """Mean and standard deviation over seeds of the validation accuracy in %, and the training loss if asked for."""
    if not done:
        return "– | –" if loss else "–"
    text = _mean([100 * record.validation_accuracy for record in done], 1)
    return f"{text} | {_mean([record.rows[-1].train_loss or float('nan') for record in done], 2)}" if loss else text


def _mean(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(name: str, folder: Path) -> str:
    """A study's table, from the runs in a folder."""
    study = STUDIES[name]
    found = {treat: {record.recipe: record for record in records.read(file_of(folder, name, treat))} for treat in TREATMENTS}
    heads = [f"{column} | training loss" if study.loss else column for column in study.columns]
    lines = [f"| validation accuracy, % | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads) * (1 + study.loss)}"]
    for variant in study.variants:
        runs = {c: [study.recipe(variant, c, seed) for seed in study.seeds] for c in study.columns}
        done = [[found[variant.treat][r] for r in runs[c] if r in found[variant.treat]] for c in study.columns]
        lines.append(f"| {variant.title} | {' | '.join(cell(one, loss=study.loss) for one in done)} |")
    return "\n".join(lines)


def run(name: str, folder: Path, images: Images) -> None:
    """Do what a study lacks."""
    for treat, recipe in STUDIES[name].runs():
        watch = Treated(TREATMENTS[treat])
        work([recipe], file_of(folder, name, treat).parent, images=images, watch=watch)


def keep(name: str, folder: Path) -> None:
    """Copy a study's runs to the results."""
    for treat in TREATMENTS:
        if (source := file_of(folder, name, treat)).exists():
            target = file_of(RESULTS / "ablations", name, treat)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(STUDIES), default=tuple(STUDIES))
    parser.add_argument("--out", type=Path, default=Path("runs", "ablations"), help="where runs are kept")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        images = load(_SHORT.data)
        for name in options.only:
            run(name, options.out, images)
    for name in options.only:
        keep(name, options.out)
    texts = {name: table(name, RESULTS / "ablations") for name in STUDIES if (RESULTS / "ablations" / name).exists()}
    PAGE.write_text(filled(PAGE.read_text(), texts))


if __name__ == "__main__":
    main()
