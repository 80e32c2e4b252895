"""`normprop demo`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.progress import track

from normprop.errors import NormPropError
from normprop.lab.commands.console import console, on_screen
from normprop.lab.figures.curves import Curve, plot_curves
from normprop.lab.figures.image import image
from normprop.lab.pages.text_table import Table
from normprop.lab.training.history import Row
from normprop.lab.training.loop import train
from normprop.lab.training.preparation import KEPT
from normprop.lab.training.recipe import Recipe, clip_at, rate_at
from normprop.lab.whole_file import check_folder, write_whole

# What is compared: label, normaliser, batch size.
SETTINGS = (
    ("NormProp, batch size 1", "normprop", 1),
    ("GroupNorm, batch size 1", "group", 1),
    ("BatchNorm, batch size 2", "batch", 2),
    ("NormProp, batch size 50", "normprop", 50),
    ("BatchNorm, batch size 50", "batch", 50),
)
_RATE, _CLIP = 0.1, 0.05  # at batch size 64
_TEST_IMAGES = 360


def demo(*, out: Path = Path("normprop-demo.png"), epochs: int = 6, seeds: int = 2, workers: int | None = None) -> None:
    """Train one network with NormProp, BatchNorm and GroupNorm, at several batch sizes, on scikit-learn's digits.

    Nothing is downloaded. The results are a table, a figure and what they show; about two minutes on two cores.

    Args:
        out: Where to write the figure.
        epochs: Passes over the 1,437 training images.
        seeds: Runs of each setting.
        workers: Runs at a time; by default one for each core.
    """
    if min(epochs, seeds, 1 if workers is None else workers) < 1:
        raise NormPropError("The demo needs --epochs, --seeds and --workers of 1 or more.\nLeave them out for the defaults.")
    check_folder(out.absolute().parent)
    if out.is_dir():
        raise NormPropError(f"{out} is a folder, and the figure is a file.\nName the file with --out.")
    began = time.monotonic()
    recipes = [recipe_of(norm, size, epochs, seed) for _, norm, size in SETTINGS for seed in range(seeds)]
    screen = console()
    screen.print(
        f"Digits (1,437 training images of 8×8), {epochs} epochs, {seeds} seeds. The same for all: the paper's network "
        "at a quarter of its width, He initialisation, SGD with momentum 0.9 and weight decay 5e-4, one-cycle rate "
        f"{_RATE:g}·(b/64)^¾, adaptive gradient clipping at {_CLIP:g}/√(b/64), where b is the batch size. NormProp is kept "
        f"calibrated, on {KEPT} training images at a time.",
        soft_wrap=True,
    )
    bar = partial(track, total=len(recipes), console=screen, transient=True, disable=not screen.is_terminal)
    runs: list[list[Row]] = []
    with _pool(workers) as run:
        for rows in bar(run(recipes), "training"):
            runs.append(rows)
            if not screen.is_terminal:
                screen.print(f"run {len(runs)} of {len(recipes)} done", soft_wrap=True)
    by_setting = [runs[i * seeds : (i + 1) * seeds] for i in range(len(SETTINGS))]
    screen.print(on_screen(_table(by_setting)))
    screen.print(conclusion(by_setting), soft_wrap=True)
    _draw(by_setting, out)
    screen.print(f"Figure: {out}. {time.monotonic() - began:.0f} s in all.", soft_wrap=True)


def recipe_of(norm: str, batch_size: int, epochs: int, seed: int) -> Recipe:
    """The demo's recipe; all are alike except for normaliser, batch size and seed."""
    return Recipe(
        model="nin",
        width=0.25,
        norm=norm,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        lr=rate_at(batch_size, _RATE),
        clip=clip_at(batch_size, _CLIP),
    )


def conclusion(runs: Sequence[Sequence[Sequence[Row]]]) -> str:
    """What the final accuracies of `runs[setting][seed]` show, in plain words."""
    finals = {label: _finals(seeds) for (label, _, _), seeds in zip(SETTINGS, runs, strict=True)}
    one, group, tiny, fifty, batch = (finals[label] for label, _, _ in SETTINGS)
    seeds = len(runs[0])
    return "\n".join(
        (
            f"At batch size 1, where BatchNorm can't train, NormProp is {_compared(one, group)} GroupNorm, "
            f"{_compared(one, fifty)} itself at 50 and {_compared(one, tiny)} BatchNorm at 2.",
            f"At batch size 50, NormProp is {_compared(fifty, batch)} BatchNorm.",
            f"{seeds} seeds on {_TEST_IMAGES} test images (one image is 0.3 points): a demonstration, not a benchmark.",
        )
    )


def _compared(a: list[float], b: list[float]) -> str:
    """How far the mean of `a` is from that of `b`, unless the ranges overlap."""
    if not a or not b:
        return "not comparable (runs diverged) with"
    gap = 100 * (statistics.mean(a) - statistics.mean(b))
    if min(a) <= max(b) and min(b) <= max(a):
        return "within the spread of"
    return f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"


def _finals(seeds: Sequence[Sequence[Row]]) -> list[float]:
    """Final test accuracy of each seed that didn't diverge."""
    return [rows[-1].test_accuracy for rows in seeds if rows[-1].test_accuracy is not None]


def _errors(rows: Sequence[Row]) -> list[float]:
    """Test error in % after each epoch; no error at all counts as half an image, because 0 has no logarithm."""
    shares = [row.test_accuracy for row in rows if row.test_accuracy is not None]
    return [100 * max(1 - share, 0.5 / _TEST_IMAGES) for share in shares]


def _table(runs: Sequence[Sequence[Sequence[Row]]]) -> Table:
    rows = []
    for (label, _, _), seeds in zip(SETTINGS, runs, strict=True):
        finals, first = _finals(seeds), [rows[0].test_accuracy for rows in seeds if rows[0].test_accuracy is not None]
        diverged = sum(rows[-1].diverged for rows in seeds)
        seconds = statistics.mean(row.seconds for rows in seeds for row in rows)
        rows.append(
            (
                label,
                f"{100 * statistics.mean(finals):.1f} ± {50 * (max(finals) - min(finals)):.1f}" if finals else "–",
                f"{100 * statistics.mean(first):.1f}" if first else "–",
                f"{diverged} of {len(seeds)}" if diverged else "none",
                f"{seconds:.1f}",
            )
        )
    columns = ("setting", "mean ± half range, %", "after 1 epoch, %", "diverged", "s per epoch")
    return Table(columns, rows, "Test accuracy after the last epoch")


def _draw(runs: Sequence[Sequence[Sequence[Row]]], out: Path) -> None:
    curves = [Curve(label, [_errors(rows) for rows in seeds]) for (label, _, _), seeds in zip(SETTINGS, runs, strict=True)]
    figure = plot_curves(
        curves,
        title=f"8×8 digits, the paper's network at a quarter of its width; mean and range of {len(runs[0])} seeds",
        y_label="test error, % (logarithmic)",
        log=True,
    )
    write_whole(out, image(figure, out.suffix.lstrip(".") or "png"))


Runner = Callable[[Sequence[Recipe]], Iterator[list[Row]]]


@contextmanager
def _pool(workers: int | None) -> Iterator[Runner]:
    """A function that runs recipes in order, several at a time: one run of a small network doesn't fill two cores."""
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield lambda recipes: map(_run, recipes)
        return
    # Forking a process that has used torch's threads can hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield lambda recipes: pool.map(_run, recipes)


def _run(recipe: Recipe) -> list[Row]:
    torch.set_num_threads(1)
    return list(train(recipe, device="cpu").rows)
