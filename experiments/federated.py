"""Federated averaging over clients who have other classes each: Fashion-MNIST, with several normalisers.

    python experiments/federated.py            # what isn't finished yet; a killed one continues
    python experiments/federated.py --report   # the table from the runs that are there

Ten clients of 200 images, whose classes are drawn from a Dirichlet distribution; every round each of them trains the
network on its images once, 8 a step, by SGD, and the server takes the mean of all that a network holds, running
statistics among it. The same for all: clients, order of images, rates, adaptive clipping or none. Rate and clipping are
chosen on 2,000 validation images with the first seed. A converted network starts calibrated, and frozen BatchNorm
measured, on 4 images of each client. Fashion-MNIST comes from $NORMPROP_DATA/fashion-mnist.npz or torchvision's download.
"""

from __future__ import annotations

import copy
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import runs_file
import torch
import torch.nn.functional as F
from own_loop import accuracy
from rivals import CONVERTED, conversion, with_normalizer
from torch import Tensor, nn

import normprop
from normprop.lab.samples.datasets import load
from normprop.optim import AdaptiveGradientClipping

OUT = Path(__file__).resolve().parent / "results" / "federated" / "runs.jsonl"
NORMS = (*CONVERTED, "batch", "frozen", "group", "layer", "mabn", "none")
ALPHAS, SEEDS = (0.1, 0.3), 3
# Rates and clippings.
SETTINGS = tuple(itertools.product((0.1, 0.3), (0.0, 0.05)))
CLIENTS, IMAGES, ROUNDS, BATCH, HELD_OUT, GIVEN = 10, 200, 10, 8, 2000, 4
KEYS = ("norm", "alpha", "rate", "clip", "seed")
Images = tuple[Tensor, Tensor]


def network() -> nn.Module:
    """Three convolutions of stride 2 and a linear layer."""
    layers: list[nn.Module] = []
    for inside, outside, size in ((1, 16, 5), (16, 32, 3), (32, 32, 3)):
        conv = nn.Conv2d(inside, outside, size, 2, size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


def data() -> dict[str, Images]:
    """Standardised images and labels: for clients, for validation, for tests."""
    images = load("fashion-mnist")
    x, x_test = ((t.float().reshape(-1, 1, 28, 28) / 255 - 0.286) / 0.353 for t in (images.x_train, images.x_test))
    y = images.y_train
    return {
        "train": (x[HELD_OUT:], y[HELD_OUT:]),
        "validation": (x[:HELD_OUT], y[:HELD_OUT]),
        "test": (x_test, images.y_test),
    }


def shares(labels: Tensor, alpha: float, seed: int) -> list[Tensor]:
    """Each client's images, `IMAGES` of them, by classes whose shares are Dirichlet(α); no image has two clients."""
    random = np.random.default_rng(seed)
    pools = [list(random.permutation(torch.where(labels == c)[0].numpy())) for c in range(int(labels.max()) + 1)]
    parts = []
    for _ in range(CLIENTS):
        counts = random.multinomial(IMAGES, random.dirichlet([alpha] * len(pools)))
        parts.append(torch.tensor([pool.pop() for pool, n in zip(pools, counts, strict=True) for _ in range(n)]))
    return parts


@torch.no_grad()
def averaged(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of what networks hold, number by number; whole numbers are the first one's."""
    return {
        key: torch.stack([state[key] for state in states]).mean(0) if value.is_floating_point() else value
        for key, value in states[0].items()
    }


def client(model: nn.Module, x: Tensor, y: Tensor, rate: float, clip: float) -> None:
    """One pass over a client's images, in an order of torch's random state."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    if clip:
        AdaptiveGradientClipping(optimizer, clip=clip, up_to=0.1)
    model.train()
    for chosen in torch.randperm(len(x)).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()


def start(norm: str, samples: Tensor) -> nn.Module:
    """The network before the first round."""
    model = with_normalizer(network(), norm, samples)
    if norm in CONVERTED:
        optimizer, options = torch.optim.SGD(model.parameters(), 0.1), conversion(norm)[1]
        normprop.keep_calibrated(model, optimizer, samples, samples=len(samples), every=0, clip=0, **options).remove()
    return model


def train(sets: dict[str, Images], what: tuple[Any, ...]) -> dict[str, Any]:
    """One run: what it was, and what came of it."""
    norm, alpha, rate, clip, seed = what
    torch.manual_seed(seed)
    x, y = sets["train"]
    parts = shares(y, alpha, seed)
    model = start(norm, torch.cat([x[part[torch.randperm(len(part))[:GIVEN]]] for part in parts]))
    began, curve = time.process_time(), []
    for _ in range(ROUNDS):
        states = []
        for part in parts:
            local = copy.deepcopy(model)
            client(local, x[part], y[part], rate, clip)
            states.append(local.state_dict())
        model.load_state_dict(averaged(states))
        curve.append(accuracy(model, *sets["validation"]))
    found = {"validation": curve[-1], "test": accuracy(model, *sets["test"]), "curve": curve}
    return dict(zip(KEYS, what, strict=True)) | found | {"seconds": time.process_time() - began}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: see `runs_file.table`."""
    pairs = itertools.product(ALPHAS, NORMS)
    rows = ((f"{alpha:g} | {norm}", {"norm": norm, "alpha": alpha}) for alpha, norm in pairs)
    return runs_file.table(runs, KEYS, SETTINGS, "α | network | test, %", rows)


def main() -> None:
    parser = runs_file.parser(__doc__, OUT, SEEDS)
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=NORMS)
    parser.add_argument("--alphas", nargs="+", type=float, default=ALPHAS)
    options = parser.parse_args()
    runs = runs_file.read(options.out)
    if not options.report:
        sets, cells = data(), itertools.product(options.norms, options.alphas)
        runs_file.study(options.out, runs, KEYS, cells, SETTINGS, options.seeds, lambda what: train(sets, what))
    print(table(runs))


if __name__ == "__main__":
    main()
