"""A trained BatchNorm network learns another task, 1 and 4 images a step: other classes of CIFAR-10 in other colours.

    python experiments/finetune.py            # what isn't finished yet; a killed one continues
    python experiments/finetune.py --report   # the table from the runs that are there

ResNet-8 at half width learns five classes with BatchNorm at batch size 64 once, and is kept beside the data sets. Then
it gets a new head and 600 steps of AdamW with a one-cycle rate on the other five, whose images have half the contrast,
are inverted, and have their colours exchanged. `head` trains the head alone for the first quarter of the steps. The
same for all: images and their order, the new head, rates, adaptive clipping or none. Rate and clipping are chosen on
2,000 validation images of the new task with the first seed. CIFAR-10 comes from $NORMPROP_DATA/cifar10.npz or
torchvision's download.
"""

from __future__ import annotations

import copy
import itertools
import time
from pathlib import Path
from typing import Any

import runs_file
import torch
import torch.nn.functional as F
from own_loop import accuracy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normprop
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer
from normprop.lab.samples.datasets import data_root, load
from normprop.optim import AdaptiveGradientClipping

OUT = Path(__file__).resolve().parent / "results" / "finetune" / "runs.jsonl"
# measured: frozen BatchNorm whose statistics were taken anew from images of the new task (Li et al. 2016).
NETWORKS = ("kept calibrated", "converted", "BatchNorm", "frozen", "measured")
BATCHES, WAYS, SEEDS = (1, 4), ("full", "head"), 3
# Rates and clippings.
SETTINGS = tuple(itertools.product((1e-3, 3e-3), (0.0, 0.05)))
STEPS, TRAINED, HELD_OUT, MEASURED = 600, 10000, 2000, 256
KEYS = ("network", "batch", "way", "rate", "clip", "seed")
Images = tuple[Tensor, Tensor]


def data() -> dict[str, Images]:
    """Images and labels: of the old task, and of the new one for training, validation and tests."""
    images = load("cifar10")
    scale = images.x_train[:TRAINED].float()
    mean, std = scale.mean((0, 2, 3), keepdim=True), scale.std((0, 2, 3), keepdim=True)

    def part(x: Tensor, y: Tensor, new: bool) -> Images:
        mine = (y >= 5) == new
        x, y = (x[mine].float() - mean) / std, y[mine] - 5 * new
        return (-0.5 * x[:, [1, 2, 0]] if new else x), y

    (x, y), (x_test, y_test) = (part(images.x_train, images.y_train, True), part(images.x_test, images.y_test, True))
    old, old_labels = part(images.x_train[: 2 * TRAINED], images.y_train[: 2 * TRAINED], False)
    return {
        "old": (old, old_labels),
        "train": (x[HELD_OUT:], y[HELD_OUT:]),
        "validation": (x[:HELD_OUT], y[:HELD_OUT]),
        "test": (x_test, y_test),
    }


def trained(sets: dict[str, Images]) -> nn.Module:
    """The BatchNorm network that has learned the old task: four epochs of SGD at batch size 64."""
    torch.manual_seed(0)
    x, y = sets["old"]
    model = build("resnet8", shape=tuple(x.shape[1:]), classes=5, norm=normalizer("batch"), width=0.5)
    kept = data_root() / "finetune-resnet8.pt"
    if kept.exists():
        model.load_state_dict(torch.load(kept))
        return model
    batches = [c for _ in range(4) for c in torch.randperm(len(x)).split(64)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=len(batches), cycle_momentum=False)
    for chosen in batches:
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    torch.save(model.state_dict(), kept)
    return model


def prepared(start: nn.Module, network: str, samples: Tensor) -> nn.Module:
    """A network with a new head, in the mode in which it trains, but not yet calibrated."""
    model: nn.Module = copy.deepcopy(start).train()
    if network == "measured":
        for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        with torch.no_grad():
            for part in samples.split(64):
                model(part)
    if network in ("kept calibrated", "converted"):
        model = normprop.convert(model.eval(), example=samples[:2]).train()
    if network in ("frozen", "measured"):
        model.eval()
    model.fc = nn.Linear(model.get_submodule("fc").in_features, 5)
    return model


def train(sets: dict[str, Images], start: nn.Module, what: tuple[Any, ...]) -> dict[str, Any]:
    """One run: what it was, and what came of it."""
    network, batch, way, rate, clip, seed = what
    torch.manual_seed(seed)
    x, y = sets["train"]
    model = prepared(start, network, x[:MEASURED])
    head = {id(p) for p in model.get_submodule("fc").parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    began, handle = time.process_time(), None
    if network == "kept calibrated":
        handle = normprop.keep_calibrated(model, optimizer, x[:MEASURED], clip=clip)
    elif clip:
        AdaptiveGradientClipping(optimizer, clip=clip)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS, cycle_momentum=False)
    order = torch.randperm(len(x))[: STEPS * batch].split(batch)
    for step, chosen in enumerate(order):
        if way == "head" and step in (0, STEPS // 4):
            for p in model.parameters():
                p.requires_grad_(step > 0 or id(p) in head)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - began
    found = {name: accuracy(model, *sets[name]) for name in ("validation", "test")}
    measuring = handle.seconds if handle else 0.0
    return dict(zip(KEYS, what, strict=True)) | found | {"seconds": seconds, "measuring": measuring}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: see `runs_file.table`."""
    words = {"full": "all", "head": "head first"}
    rows = (
        (f"{batch}, {words[way]} | {network}", {"network": network, "batch": batch, "way": way})
        for batch, way, network in itertools.product(BATCHES, WAYS, NETWORKS)
    )
    return runs_file.table(runs, KEYS, SETTINGS, "batch, trained | network | test, %", rows)


def main() -> None:
    parser = runs_file.parser(__doc__, OUT, SEEDS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    runs = runs_file.read(options.out)
    if not options.report:
        sets, cells = data(), itertools.product(NETWORKS, options.batches, options.ways)
        start = trained(sets)
        runs_file.study(options.out, runs, KEYS, cells, SETTINGS, options.seeds, lambda what: train(sets, start, what))
    print(table(runs))


if __name__ == "__main__":
    main()
