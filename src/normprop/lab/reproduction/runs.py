"""The runs of each experiment. A recipe that several experiments name is trained once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from normprop.lab.networks.normalizers import Normalizer, normalizer
from normprop.lab.reproduction.scale import Scale
from normprop.lab.training.recipe import Recipe

# The paper's method without and with gradient clipping, this library's form of it, the paper's rival, and nothing.
CONTENDERS = ("paper", "paper-clip", "normprop", "batch", "none")
NORM_OF = {"paper-clip": "paper", "none-slow": "none"}
_CLIPPED = ("paper-clip", "normprop")
TITLES = {
    "paper": "NormProp as printed",
    "paper-clip": "NormProp as printed, clipped",
    "normprop": "NormProp, exact moments",
    "batch": "BatchNorm",
    "none": "no normaliser",
    "none-slow": "no normaliser, rate 1e-4",
}

BATCH_SIZES = (1, 50, 100, 250)
# Figure 2 trains "without normalisation" at this rate.
SLOW_RATE = 1e-4

Key = tuple[Any, ...]
# The runs of each cell of an experiment, over seeds.
Cells = Mapping[Key, Sequence[Recipe]]


def rate(batch_size: int) -> float:
    """The power law through the paper's two rates for CIFAR-10, .05 at batch size 50 and .08 at 100.

    Example:
        >>> [rate(size) for size in (1, 50, 100, 250)]
        [0.00352327, 0.05, 0.08, 0.148909]
    """
    return float(f"{0.05 * (batch_size / 50) ** math.log2(0.08 / 0.05):.6g}")


def norm_of(name: str) -> Normalizer:
    """The normaliser of a contender."""
    return normalizer(NORM_OF.get(name, name))


def recipe(scale: Scale, name: str, *, batch_size: int = 50, seed: int = 0, **changes: Any) -> Recipe:
    """A contender's run at the paper's settings, which have no gradient clipping.

    Exact moments and `paper-clip` keep this library's default clipping; exact moments count the covariance of inputs whole.
    Without a normaliser the rate is lower by the same factor as the library's default rate.
    """
    schedule = scale.single if batch_size == 1 else scale.usual
    lr = rate(batch_size) * norm_of(name).rate / normalizer("batch").rate
    settings: dict[str, Any] = {
        "data": scale.data[0],
        "model": "nin",
        "width": scale.width,
        "epochs": schedule.epochs,
        "train_images": scale.train_images,
        "validation": scale.validation,
        "schedule": "halving",
        "halve_every": schedule.halve_every,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "norm": norm_of(name).name,
        "batch_size": batch_size,
        "lr": float(f"{lr:.6g}"),
        "clip": None if name in _CLIPPED else 0.0,
        "shrinkage": 0.0 if name == "normprop" else None,
        "beta": 0.0,
        "seed": seed,
    }
    return Recipe(**settings | changes).resolved()


def _fig1(scale: Scale, _seeds: int) -> Cells:
    schedule = {"epochs": scale.data_norm.epochs, "halve_every": scale.data_norm.halve_every}
    return {
        (name, mode, size): [recipe(scale, name, batch_size=size, data_norm=mode, **schedule)]
        for name in CONTENDERS
        for mode in ("global", "batch")
        for size in (50, 100)
    }


def _fig2(scale: Scale, _seeds: int) -> Cells:
    cells = {(name,): [recipe(scale, name)] for name in CONTENDERS}
    return cells | {("none-slow",): [recipe(scale, "none-slow", lr=SLOW_RATE)]}


def _fig3(scale: Scale, seeds: int) -> Cells:
    return {(name,): [recipe(scale, name, seed=seed) for seed in range(seeds)] for name in CONTENDERS}


def _fig4(scale: Scale, seeds: int) -> Cells:
    return {
        (name, size): [recipe(scale, name, batch_size=size, seed=seed) for seed in range(seeds)]
        for name in CONTENDERS
        for size in BATCH_SIZES
        if size >= norm_of(name).smallest_batch
    }


def _table1(scale: Scale, seeds: int) -> Cells:
    return {
        (data, flips, name): [_table_recipe(scale, data, flips, name, seed) for seed in range(seeds)]
        for data in scale.data
        for flips in (False, True)
        for name in CONTENDERS
        if not (data == "svhn" and flips)
    }


def _table_recipe(scale: Scale, data: str, flips: bool, name: str, seed: int) -> Recipe:
    if data != "svhn":
        return recipe(scale, name, data=data, flips=flips, seed=seed)
    schedule = {"epochs": scale.svhn.epochs, "halve_every": scale.svhn.halve_every}
    return recipe(scale, name, batch_size=100, data=data, seed=seed, **schedule)


def _bound(scale: Scale, _seeds: int) -> Cells:
    return {(name,): [recipe(scale, name)] for name in CONTENDERS}


_CELLS: dict[str, Callable[[Scale, int], Cells]] = {
    "fig1": _fig1,
    "fig2": _fig2,
    "fig3": _fig3,
    "fig4": _fig4,
    "table1": _table1,
    "bound": _bound,
}


def cells(part: str, scale: Scale, seeds: int) -> Cells:
    """The cells of an experiment with their runs; none for `speed`, which times steps.

    Example:
        >>> from normprop.lab.reproduction.scale import SCALES
        >>> len(cells("fig4", SCALES["full"], 3)), len(cells("speed", SCALES["full"], 3))
        (19, 0)
    """
    return _CELLS[part](scale, seeds) if part in _CELLS else {}


def runs(parts: Iterable[str], scale: Scale, seeds: int) -> list[Recipe]:
    """The runs of several experiments, each once: seed by seed, batch size 1 last."""
    found = dict.fromkeys(run for part in parts for cell in cells(part, scale, seeds).values() for run in cell)
    return sorted(found, key=lambda run: (scale.data.index(run.data), run.seed, run.batch_size == 1))


def probed(scale: Scale) -> frozenset[Recipe]:
    """The runs whose hidden layers are measured after each epoch."""
    return frozenset(runs(("fig2", "bound"), scale, 1))
