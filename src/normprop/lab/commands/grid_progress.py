"""A list of runs that is worked through, with its progress shown."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from normprop.errors import NormPropError
from normprop.lab.comparison import records
from normprop.lab.comparison.comparison import remaining_seconds
from normprop.lab.comparison.records import RUNS, Record
from normprop.lab.comparison.workers import Watch, unwatched, work, work_together
from normprop.lab.samples.images import Images
from normprop.lab.training.recipe import Recipe


def resume_advice(out: Path) -> str:
    """How to go on when runs were interrupted."""
    return f"The same command goes on; {out / RUNS} has the finished runs."


def checked_jobs(jobs: int | None) -> int:
    """The number of runs at a time; by default one per core.

    Raises:
        NormPropError: below 1.
    """
    if jobs is not None and jobs < 1:
        raise NormPropError(f"--jobs is {jobs}.\nUse 1 or more.")
    return jobs or os.cpu_count() or 1


def do_missing(
    recipes: Sequence[Recipe],
    out: Path,
    *,
    images: Images,
    jobs: int,
    device: str,
    screen: Console,
    watch: Watch = unwatched,
) -> bool:
    """Do the runs that aren't finished and show the progress; False if another command is still doing some of them."""
    with GridProgress(screen, out, recipes, jobs) as progress:
        if jobs == 1:
            torch.set_num_threads(1)
            work(recipes, out, images=images, device=device, watch=watch, finished=progress.update)
        else:
            work_together(recipes, out, jobs=jobs, device=device, watch=watch, finished=progress.update)
        left = len(progress.missing())
    if left:
        screen.print(f"{left} runs on {recipes[0].data} are still being done by another command.", soft_wrap=True)
    return not left


class GridProgress:
    """A bar on a terminal, a line for each finished run elsewhere."""

    def __init__(self, screen: Console, out: Path, recipes: Sequence[Recipe], jobs: int) -> None:
        self.screen, self.file, self.recipes, self.jobs = screen, out / RUNS, recipes, jobs
        self.shown = {record.recipe for record in records.read(self.file)}
        self.size = 0  # of the file when it was last read
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
        self.task: TaskID = self.bar.add_task("", total=len(recipes), completed=len(recipes) - len(self.missing()))

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def missing(self) -> list[Recipe]:
        """Runs that aren't finished."""
        return [recipe for recipe in self.recipes if recipe not in self.shown]

    def update(self) -> None:
        """Show what was finished since the last call. It may be called often: the file is read only if it has grown."""
        size = self.file.stat().st_size if self.file.is_file() else 0
        if size == self.size:
            return
        self.size = size
        found = records.read(self.file)
        new = [record for record in found if record.recipe not in self.shown]
        if not new:
            return
        self.shown |= {record.recipe for record in new}
        missing = self.missing()
        seconds = remaining_seconds(missing, found)
        left = f"about {_duration(seconds / self.jobs)} left" if seconds else ""
        self.bar.update(self.task, completed=len(self.recipes) - len(missing), description=left)
        for record in new:
            done = f"{len(self.recipes) - len(missing)}/{len(self.recipes)}"
            self.screen.print(f"{done}  {_described(record)}  {left}".rstrip(), soft_wrap=True, markup=False)


def _described(record: Record) -> str:
    recipe = record.recipe
    clip = f" clip {recipe.clip:.3g}" if recipe.clip else ""
    end = "diverged" if record.diverged else f"validation {100 * record.validation_accuracy:.1f} %"
    return (
        f"{recipe.norm:<10} batch {recipe.batch_size} rate {recipe.lr:.3g}{clip} seed {recipe.seed}: {end}, "
        f"{record.cpu_seconds:.0f} s"
    )


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
