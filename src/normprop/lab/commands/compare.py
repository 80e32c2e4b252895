"""`normprop compare`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from normprop.errors import NormPropError
from normprop.lab.commands.console import advising, console, on_screen
from normprop.lab.commands.grid_progress import checked_jobs, do_missing, resume_advice
from normprop.lab.comparison import records
from normprop.lab.comparison.comparison import cells, choices, clips_of, columns, points, promoted, to_dict
from normprop.lab.comparison.grid import Grid, check_comparable
from normprop.lab.comparison.records import RUNS, Record
from normprop.lab.figures.comparison_figure import plot_batch_sizes, plot_curves, plot_rates
from normprop.lab.figures.image import image
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer
from normprop.lab.pages.html_page import html_page
from normprop.lab.pages.text_table import Table
from normprop.lab.samples.datasets import load
from normprop.lab.samples.images import Images
from normprop.lab.training.preparation import prepared
from normprop.lab.training.recipe import Recipe
from normprop.lab.whole_file import check_folder, write_whole


def compare(
    grid: Grid,
    *,
    out: Path = Path("comparison"),
    jobs: int | None = None,
    device: str = "cpu",
    summary_only: bool = False,
) -> None:
    """Compare normalisers, each at its own best learning rate and clipping, chosen on validation images.

    Every run is one line of runs.jsonl. The same command continues a grid that was interrupted; more normalisers,
    rates, batch sizes or seeds in the same folder add to what is there, and several commands may share the work. The
    results are table.md, table.json, curves.png, rate.png, batch_size.png and index.html.

    Args:
        grid: What to compare, and the setting.
        out: Folder for the results.
        jobs: Runs at a time, one thread each; by default one for each core.
        device: cpu, cuda, cuda:1, mps …
        summary_only: Train nothing; write the table and figures from the runs that are finished.
    """
    screen = console()
    check_folder(out)
    if records.drop_fragment(out / RUNS):
        screen.print(f"{out / RUNS} ended in the middle of a line: that run is repeated.", soft_wrap=True)
    with advising(resume_advice(out)):
        if not summary_only:
            _train(grid, out, checked_jobs(jobs), device, screen)
    found = records.read(out / RUNS)
    if not found:
        raise NormPropError(f"{out / RUNS} has no finished runs.\nName the folder of a comparison with --out.")
    check_comparable([record.recipe for record in found])
    summarize(found, out, screen)


def _train(grid: Grid, out: Path, jobs: int, device: str, screen: Console) -> None:
    images = load(grid.data, image_size=grid.image_size)
    grid = grid.fitted(images)
    recipes = grid.recipes()
    check_comparable([*recipes, *(record.recipe for record in records.read(out / RUNS))])
    _check_buildable(recipes, images)
    for norm, size in grid.left_out():
        screen.print(f"{norm} can't train at batch size {size} and is left out there.", soft_wrap=True)
    for part in grid.rounds():
        recipes = part.recipes()
        if grid.finalists is not None and part.seeds > 1:
            recipes = promoted(recipes, records.read(out / RUNS), grid.finalists, grid.contenders)
        if not do_missing(recipes, out, images=images, jobs=jobs, device=device, screen=screen):
            return
    shutil.rmtree(out / ".claims", ignore_errors=True)


def _check_buildable(recipes: Sequence[Recipe], images: Images) -> None:
    """Raise now, not after hours, for what doesn't go together."""
    part = prepared(images, recipes[0])
    for recipe in {(r.norm, r.batch_size): r for r in recipes}.values():
        recipe.check_fits(part)
        norm = normalizer(recipe.norm)
        build(recipe.model, shape=part.shape, classes=part.classes, norm=norm, width=recipe.width)


def summarize(found: Sequence[Record], out: Path, screen: Console) -> None:
    """Print the table; write it and the figures to `out`."""
    by_point = points(found)
    chosen, clips = choices(by_point), clips_of(by_point)
    title, notes = _title(found[0].recipe), _notes(found)
    table = Table(columns(clips), [cells(choice, clips) for choice in chosen], title, words=(1,))
    figures = {
        "curves.png": ("Validation accuracy over epochs, each at its best", plot_curves(chosen, title)),
        "rate.png": ("Validation accuracy against the learning rate", plot_rates(by_point, title)),
        "batch_size.png": ("Test accuracy against the batch size, each at its best", plot_batch_sizes(chosen, title)),
    }
    images = {caption: image(figure) for caption, figure in figures.values()}
    for name, (caption, _) in figures.items():
        write_whole(out / name, images[caption])
    page = "\n\n".join([f"# {title}", dataclasses.replace(table, title="").markdown(), *notes])
    write_whole(out / "table.md", f"{page}\n".encode())
    report = {"setting": title, "notes": notes, "choices": [to_dict(choice) for choice in chosen]}
    write_whole(out / "table.json", json.dumps(report, indent=2).encode())
    write_whole(out / "index.html", html_page(table, notes, images).encode())
    screen.print(on_screen(table))
    for note in notes:
        screen.print(note, soft_wrap=True)
    screen.print(f"Results in {out}: index.html has all of it.", soft_wrap=True)


def _title(recipe: Recipe) -> str:
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    images = "" if recipe.train_images is None else f" of {recipe.train_images:,} images"
    return f"{recipe.model} ×{recipe.width:g} on {recipe.data}, {epochs}{images}, {recipe.schedule}"


def _notes(found: Sequence[Record]) -> list[str]:
    recipe = found[0].recipe
    seeds = len({record.recipe.seed for record in found})
    over = "One seed." if seeds == 1 else f"Mean ± standard deviation over up to {seeds} seeds."
    return [
        f"Rate and clipping of each row are the best by mean accuracy on {recipe.validation:,} validation images; the test "
        f"set took no part in the choice. {over} A run that diverged counts as a guess. CPU s: processor time of a run.",
        "Rates and clippings are those at batch size 64: at b the rate is multiplied by (b/64)^¾, the clipping divided "
        "by √(b/64). The same were tried for all. A rate trains if it reaches 80 % of the best validation accuracy at its "
        "batch size; (edge): the best may lie beyond the rates tried.",
        f"{_optimizer(recipe)}, weight decay {recipe.weight_decay:g}; flips {'on' if recipe.flips else 'off'}, "
        f"crops {recipe.crops}. {len(found)} runs, {sum(r.cpu_seconds for r in found) / 3600:.2f} CPU hours; "
        f"{records.software(found)}.",
    ]


def _optimizer(recipe: Recipe) -> str:
    return f"SGD, momentum {recipe.momentum:g}" if recipe.optimizer == "sgd" else recipe.optimizer
