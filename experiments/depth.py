"""Do deep networks train from the start without tuning? The table and figure of docs/laboratory.md.

python experiments/depth.py             # what isn't finished yet, then the page; about an hour of one core
python experiments/depth.py --report    # the page from the runs that are there

ResNet-110 and a plain network of 50 layers without skips, on 10,000 images of CIFAR-10 for one epoch, calibrated on 256
images. Besides accuracy: measured over predicted standard deviation behind every site, before and after, on test images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from learning import PAGE, RESULTS
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer

import normprop
from normprop.conversion.lane import lane_of
from normprop.lab.pages.marked_page import filled
from normprop.lab.samples.datasets import load
from normprop.lab.samples.images import Images
from normprop.lab.training.loop import train
from normprop.lab.training.observer import Observer
from normprop.lab.training.recipe import Recipe

BASE = Recipe(data="cifar10", batch_size=64, epochs=1, train_images=10_000, dtype="bf16", keep_calibrated=False)
MODELS = {"resnet110": "ResNet-110", "plain50": "plain, 50 layers"}
VARIANTS: dict[str, dict[str, Any]] = {
    "NormProp": {},
    "not calibrated": {"calibrate": 0},
    "β starts at 0": {"beta": 0.0},
    "BatchNorm": {"norm": "batch"},
    "BatchNorm, β starts at 1": {"norm": "batch", "beta": 1.0},
    "none": {"norm": "none"},
}
SEEDS = (0,)
# Test images on which layers are measured.
PROBED = 128


class Ratios(Observer):
    """Measured over predicted standard deviation, rms over channels, behind every convolution that a site scales."""

    def __init__(self, images: Images) -> None:
        self.x = images.x_test[:PROBED]
        self.before: list[float] = []
        self.model: nn.Module | None = None

    def started(self, recipe: Recipe, model: nn.Module, optimizer: Optimizer, *, train: int, test: int) -> None:
        """Measure before the first step."""
        self.model = model
        self.before = self.measured()

    def measured(self) -> list[float]:
        """Of every layer now, none for a network that isn't converted."""
        assert self.model is not None
        standardize, network = self.model.children()
        if lane_of(network) is None:
            return []
        return ratios(network, standardize(self.x))


def ratios(network: nn.Module, x: Tensor) -> list[float]:
    """See `Ratios`."""
    rows = [row for row in normprop.inspect(network, x) if row.operation == "Conv2d" and row.measured and row.predicted]
    return [float((row.measured.var.mean() / row.predicted.var.mean()).sqrt()) for row in rows]


def wanted() -> list[tuple[str, str, int]]:
    """Model, variant and seed of every run, those first that say most."""
    return [(model, variant, seed) for seed in SEEDS for model in MODELS for variant in VARIANTS]


def run(model: str, variant: str, seed: int, images: Images) -> dict[str, Any]:
    """Train once."""
    recipe = dataclasses.replace(BASE, model=model, seed=seed, **VARIANTS[variant]).resolved()
    observer = Ratios(images)
    row = train(recipe, images=images, device="cpu", observer=observer).rows[-1]
    return {
        "model": model,
        "variant": variant,
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "test_accuracy": row.test_accuracy,
        "train_loss": row.train_loss,
        "diverged": row.diverged,
        "before": observer.before,
        "after": [] if row.diverged else observer.measured(),
    }


def read(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The runs that are there."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {(one["model"], one["variant"], one["seed"]): one for one in found}


def table(found: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """Accuracy, and the ratio in the first and last layer and where it is furthest from one."""
    lines = [
        "| network | | test accuracy, % | measured / predicted std, least–most, before training | after it |",
        "|---|---|---|---|---|",
    ]
    for model, title in MODELS.items():
        for variant in VARIANTS:
            runs = [one for seed in SEEDS if (one := found.get((model, variant, seed)))]
            if runs:
                scores = ", ".join("diverged" if r["diverged"] else f"{100 * r['test_accuracy']:.1f}" for r in runs)
                before, after = (span([r[key] for r in runs]) for key in ("before", "after"))
                lines.append(f"| {title} | {variant} | {scores} | {before} | {after} |")
    return "\n".join(lines)


def span(series: list[list[float]]) -> str:
    """Least and most over layers, the mean of seeds."""
    known = [one for one in series if one]
    if not known:
        return "–"
    least, most = (statistics.mean(map(of, known)) for of in (min, max))
    return f"{least:.2f}–{most:.2f}"


def draw(found: dict[tuple[str, str, int], dict[str, Any]], path: Path) -> None:
    """Ratios over depth, before and after training."""
    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    colours = {"NormProp": "#0072B2", "not calibrated": "#E69F00", "β starts at 0": "#009E73"}
    for axes, (model, title) in zip(figure.subplots(1, len(MODELS), sharey=True), MODELS.items(), strict=True):
        for variant, colour in colours.items():
            one = found.get((model, variant, SEEDS[0]))
            for key, line in (("before", "-"), ("after", "--")):
                if one and one[key]:
                    axes.plot(range(1, len(one[key]) + 1), one[key], line, color=colour, label=f"{variant}, {key}")
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.set_xlabel("convolution")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("measured / predicted std")
        axes.label_outer()
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs", "depth"), help="where runs are kept")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    path = options.out / "runs.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report:
        torch.set_num_threads(1)
        images = load(BASE.data)
        for key in wanted():
            if key not in read(path):
                done = run(*key, images)
                print(*key, done["test_accuracy"], flush=True)
                with path.open("a") as file:
                    file.write(json.dumps(done) + "\n")
    found = read(path)
    (RESULTS / "depth").mkdir(parents=True, exist_ok=True)
    (RESULTS / "depth" / "runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found.values()))
    draw(found, RESULTS / "depth" / "depth.png")
    figure = "![measured over predicted standard deviation over depth](../experiments/results/depth/depth.png)"
    PAGE.write_text(filled(PAGE.read_text(), {"depth": f"{table(found)}\n\n{figure}"}))


if __name__ == "__main__":
    main()
