"""How much the networks of docs/laboratory.md stretch small differences, and what β `normprop train` starts them at.

python experiments/stretch.py             # five minutes of one core, then the page
python experiments/stretch.py --report    # the page from what was measured

Calibrated on 256 training images, β of all sites at 0, ½ and 1, before any training; three seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch
from learning import PAGE, RESULTS

import normprop
from normprop.lab.pages.marked_page import filled
from normprop.lab.samples.datasets import load
from normprop.lab.training.preparation import build_model, some, start_beta
from normprop.lab.training.processes import processes
from normprop.lab.training.recipe import Recipe

BETAS = (0.0, 0.5, 1.0)
SEEDS = (0, 1, 2)
NETWORKS = {
    "ResNet-8": Recipe(data="cifar10", model="resnet8"),
    "the paper's, ×0.25": Recipe(data="cifar10", model="nin", width=0.25),
    "plain, 12 layers, ×0.5, Fashion-MNIST": Recipe(data="fashion-mnist", model="plain12", width=0.5),
    "ResNet-20": Recipe(data="cifar10", model="resnet20"),
    "ResNet-110": Recipe(data="cifar10", model="resnet110"),
    "plain, 50 layers": Recipe(data="cifar10", model="plain50"),
}
FILE = RESULTS / "stretch" / "stretch.json"


def measured(recipe: Recipe, seed: int) -> dict[str, Any]:
    """The stretch of one network at each β, and which of them `init_beta_` takes."""
    images = load(recipe.data)
    recipe = dataclasses.replace(recipe, batch_size=64, seed=seed, beta=0.0).resolved()
    with processes("cpu") as group:
        standardize, network = build_model(recipe, images, group).children()
    x = standardize(some(images, seed, 256))
    found = []
    for beta in BETAS:
        if beta:
            start_beta(network, beta)
            normprop.calibrate(network, x, **recipe.covariance())
        found.append(normprop.stretch(network, x))
    return {"stretch": found, "beta": normprop.init_beta_(network, x, **recipe.covariance())}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each network; of several seeds least and most."""
    lines = [
        f"| network | {' | '.join(f'β = {beta:g}' for beta in BETAS)} | starts at |",
        f"|---|{'---:|' * (len(BETAS) + 1)}",
    ]
    for title, runs in found.items():
        spans = [_span([run["stretch"][i] for run in runs]) for i in range(len(BETAS))]
        starts = ", ".join(f"{beta:g}" for beta in sorted({run["beta"] for run in runs}))
        lines.append(f"| {title} | {' | '.join(spans)} | {starts} |")
    return "\n".join(lines)


def _span(values: list[float]) -> str:
    least, most = (f"{value:.3g}" for value in (min(values), max(values)))
    return least if least == most else f"{least}–{most}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.report:
        torch.set_num_threads(1)
        found: dict[str, list[dict[str, Any]]] = {title: [] for title in NETWORKS}
        for seed in SEEDS:
            for title, recipe in NETWORKS.items():
                found[title].append(measured(recipe, seed))
                print(title, seed, found[title][-1], flush=True)
        FILE.parent.mkdir(parents=True, exist_ok=True)
        FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), {"stretch": table(json.loads(FILE.read_text()))}))


if __name__ == "__main__":
    main()
