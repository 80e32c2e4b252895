"""How far a plan is: a row a cell, with an estimate of the time that is left."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from normprop.lab.convergence import cell_file, choice
from normprop.lab.convergence.cell_file import CellFile
from normprop.lab.convergence.plan import Cell
from normprop.lab.convergence.queue import Folders
from normprop.lab.pages.text_table import Table


@dataclass(frozen=True)
class State:
    """How far one cell is.

    Attributes:
        cell: The cell.
        file: What there is of it; None before its rate is chosen.
        tried: Finished short runs of its normaliser.
        left: Estimated seconds until it is finished, with the short runs where it comes first.
    """

    cell: Cell
    file: CellFile | None
    tried: int
    left: float

    @property
    def finished(self) -> bool:
        """Whether nothing is left of it."""
        return self.file is not None and self.file.finished

    def words(self) -> str:
        """The state in words."""
        if self.file is None:
            of = len(self.cell.group.candidates(self.cell.norm))
            return f"choosing its rate, {self.tried} of {of} short runs" if 0 < self.tried < of else "not begun"
        if self.file.diverged:
            return f"diverged in epoch {len(self.file.rows)}"
        return "finished" if self.finished else f"epoch {len(self.file.rows)} of {self.file.recipe.epochs}"


def states(cells: Sequence[Cell], folders: Folders) -> list[State]:
    """The state of each cell."""
    files = {cell: cell_file.read(folders.cells, cell.name) for cell in cells}
    done = {cell: len(choice.tried(cell, folders.choice(cell))) for cell in cells}
    found, paid = [], set()
    for cell in cells:
        file, seconds = files[cell], _epoch_seconds(cell, files)
        epochs = cell.group.base.epochs - (len(file.rows) if file else 0)
        left = 0.0 if file and file.finished else epochs * seconds
        pair = (cell.group.name, cell.norm)
        if file is None and pair not in paid:
            paid.add(pair)
            left += (len(cell.group.candidates(cell.norm)) - done[cell]) * _short_share(cell) * seconds
        found.append(State(cell, file, done[cell], left))
    return found


def _epoch_seconds(cell: Cell, files: dict[Cell, CellFile | None]) -> float:
    """Of the cell's own epochs; else of its group's with the same normaliser, then with any; else as the plan guesses."""
    of_group = [(other, file) for other, file in files.items() if other.group is cell.group and file and file.rows]
    for alike in (
        [file for other, file in of_group if other == cell],
        [file for other, file in of_group if other.norm == cell.norm],
        [file for _, file in of_group],
    ):
        if alike:
            return statistics.median(float(row["seconds"]) for file in alike for row in file.rows)
    return cell.group.epoch_seconds


def _short_share(cell: Cell) -> float:
    """A short run's share of an epoch."""
    short = cell.group.short
    whole = cell.group.base.train_images or 50_000
    return short.epochs * short.images / whole


def state_table(found: Sequence[State]) -> Table:
    """The states, and the sum of what is left."""
    rows = [
        (state.cell.name, state.words(), _accuracy(state.file), "" if state.finished else duration(state.left))
        for state in found
    ]
    left = sum(state.left for state in found)
    done = sum(state.finished for state in found)
    note = f"{done} of {len(found)} cells are finished; about {duration(left)} of one core left." if left else ""
    return Table(("cell", "state", "test, %", "left"), rows, note=note or "All cells are finished.", words=(0, 1))


def _accuracy(file: CellFile | None) -> str:
    accuracy = file.test_accuracy if file else None
    return "–" if accuracy is None else f"{100 * accuracy:.2f}"


def duration(seconds: float) -> str:
    """Hours and minutes as text.

    Example:
        >>> duration(90), duration(5400)
        ('2 min', '1 h 30 min')
    """
    minutes = -int(-seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
