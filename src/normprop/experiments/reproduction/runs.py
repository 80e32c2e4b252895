"""The runs of each experiment. Experiments share runs: a recipe that several of them name is trained once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from normprop.experiments.normalizers import normalizer
from normprop.experiments.recipe import Recipe
from normprop.experiments.reproduction.scale import Scale

# The paper's method, this library's default, the paper's rival, and nothing.
NORMS = ("paper", "normprop", "batch", "none")
TITLES = {
    "paper": "NormProp as printed",
    "normprop": "NormProp, exact moments",
    "batch": "BatchNorm",
    "none": "no normaliser",
    "none-slow": "no normaliser, rate 1e-4",
}

BATCH_SIZES = (1, 50, 100, 250)
# "Without normalisation" in figure 2 is trained at this rate.
SLOW_RATE = 1e-4

Key = tuple[Any, ...]
# A cell of an experiment, and its runs over seeds.
Cells = Mapping[Key, Sequence[Recipe]]


def rate(batch_size: int) -> float:
    """The power law through the paper's two rates for CIFAR-10, .05 at batch size 50 and .08 at 100.

    Example:
        >>> [rate(size) for size in (1, 50, 100, 250)]
        [0.00352327, 0.05, 0.08, 0.148909]
    """
    return float(f"{0.05 * (batch_size / 50) ** math.log2(0.08 / 0.05):.6g}")


def recipe(scale: Scale, norm: str, *, batch_size: int = 50, seed: int = 0, **changes: Any) -> Recipe:
    """A run at the paper's settings: the paper's own method, BatchNorm and nothing without gradient clipping.

    Exact moments keep this library's default clipping. Without normaliser the rate is lower by the factor that the
    library's default is.
    """
    schedule = scale.single if batch_size == 1 else scale.usual
    lr = rate(batch_size) * normalizer(norm).rate / normalizer("batch").rate
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
        "norm": norm,
        "batch_size": batch_size,
        "lr": float(f"{lr:.6g}"),
        "clip": None if norm == "normprop" else 0.0,
        "seed": seed,
    }
    return Recipe(**settings | changes).resolved()


def _fig1(scale: Scale, _seeds: int) -> Cells:
    schedule = {"epochs": scale.data_norm.epochs, "halve_every": scale.data_norm.halve_every}
    return {
        (norm, mode, size): [recipe(scale, norm, batch_size=size, data_norm=mode, **schedule)]
        for norm in NORMS
        for mode in ("global", "batch")
        for size in (50, 100)
    }


def _fig2(scale: Scale, _seeds: int) -> Cells:
    cells = {(norm,): [recipe(scale, norm)] for norm in NORMS}
    return cells | {("none-slow",): [recipe(scale, "none", lr=SLOW_RATE)]}


def _fig3(scale: Scale, seeds: int) -> Cells:
    return {(norm,): [recipe(scale, norm, seed=seed) for seed in range(seeds)] for norm in NORMS}


def _fig4(scale: Scale, seeds: int) -> Cells:
    return {
        (norm, size): [recipe(scale, norm, batch_size=size, seed=seed) for seed in range(seeds)]
        for norm in NORMS
        for size in BATCH_SIZES
        if size >= normalizer(norm).smallest_batch
    }


def _table1(scale: Scale, seeds: int) -> Cells:
    return {
        (data, flips, norm): [_table_recipe(scale, data, flips, norm, seed) for seed in range(seeds)]
        for data in scale.data
        for flips in (False, True)
        for norm in NORMS
        if not (data == "svhn" and flips)
    }


def _table_recipe(scale: Scale, data: str, flips: bool, norm: str, seed: int) -> Recipe:
    if data != "svhn":
        return recipe(scale, norm, data=data, flips=flips, seed=seed)
    schedule = {"epochs": scale.svhn.epochs, "halve_every": scale.svhn.halve_every}
    return recipe(scale, norm, batch_size=100, data=data, seed=seed, **schedule)


def _bound(scale: Scale, _seeds: int) -> Cells:
    return {(norm,): [recipe(scale, norm)] for norm in NORMS}


_CELLS: dict[str, Callable[[Scale, int], Cells]] = {
    "fig1": _fig1,
    "fig2": _fig2,
    "fig3": _fig3,
    "fig4": _fig4,
    "table1": _table1,
    "bound": _bound,
}


def cells(part: str, scale: Scale, seeds: int) -> Cells:
    """The cells of an experiment with their runs; none for `speed`, which times steps instead.

    Example:
        >>> from normprop.experiments.reproduction.scale import SCALES
        >>> len(cells("fig4", SCALES["full"], 3)), cells("speed", SCALES["full"], 3)
        (15, {})
    """
    return _CELLS[part](scale, seeds) if part in _CELLS else {}


def runs(parts: Iterable[str], scale: Scale, seeds: int) -> list[Recipe]:
    """The runs of several experiments, each once; those first that say most: seed by seed, batch size 1 last."""
    found = dict.fromkeys(run for part in parts for cell in cells(part, scale, seeds).values() for run in cell)
    return sorted(found, key=lambda run: (scale.data.index(run.data), run.seed, run.batch_size == 1))


def probed(scale: Scale) -> frozenset[Recipe]:
    """Runs whose hidden layers are measured after each epoch, whichever experiment asks for them."""
    return frozenset(runs(("fig2", "bound"), scale, 1))
