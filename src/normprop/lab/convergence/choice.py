"""The choice of a rate and a clipping by short runs and validation images, the same for every normaliser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normprop.lab.comparison import records
from normprop.lab.comparison.records import RUNS, Record
from normprop.lab.comparison.workers import work
from normprop.lab.convergence.plan import Cell
from normprop.lab.samples.images import Images
from normprop.lab.training.recipe import Recipe

# Accuracies of single short runs that are closer than this say nothing about which is better.
_TOLD_APART = 0.005


def tried(cell: Cell, folder: Path) -> list[Record]:
    """The short runs of a cell's normaliser that are finished."""
    wanted = set(cell.group.candidates(cell.norm))
    return [record for record in records.read(folder / RUNS) if record.recipe in wanted]


def try_all(cell: Cell, folder: Path, images: Images, device: str = "cpu") -> list[Record]:
    """Do the short runs that are missing; what is there afterwards, which is less if another process does some of them."""
    work(cell.group.candidates(cell.norm), folder, images=images, device=device)
    return tried(cell, folder)


def chosen(cell: Cell, runs: Sequence[Record]) -> Recipe:
    """The recipe of the cell, with the lowest rate of the short runs that tell no difference from the best one.

    Short runs favour high rates: what a rate breaks over a long run, they don't see. Of equal rates the better clipping.
    """
    least = max(record.validation_accuracy for record in runs) - _TOLD_APART
    close = [record for record in runs if record.validation_accuracy >= least]
    best = min(close, key=lambda record: (record.recipe.lr or 0.0, -record.validation_accuracy))
    return cell.group.recipe(cell.norm, cell.seed, best.recipe.lr, best.recipe.clip)


def account(runs: Sequence[Record]) -> list[dict[str, Any]]:
    """The short runs as plain values."""
    return [
        {
            "lr": record.recipe.lr,
            "clip": record.recipe.clip,
            "validation_accuracy": None if record.diverged else record.validation_accuracy,
        }
        for record in runs
    ]
