"""A cell's file: what it is, how its rate was chosen, and a row an epoch. Small, and written whole after each epoch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normprop.errors import NormPropError
from normprop.lab.training.history import Row
from normprop.lab.training.recipe import ADDED, Recipe
from normprop.lab.whole_file import write_whole


@dataclass(frozen=True)
class CellFile:
    """A cell as far as it has come.

    Attributes:
        cell: Its name.
        recipe: With all defaults, and the rate and clipping that were chosen.
        choice: The short runs it was chosen from: rate, clipping, validation accuracy (None if the run diverged).
        rows: One an epoch: the training loop's, and `drift` and `gamma` as `pulse` has them.
        versions: Versions of the software of each session that added rows, without repetition.
    """

    cell: str
    recipe: Recipe
    choice: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]
    versions: Sequence[Mapping[str, str]]

    @property
    def diverged(self) -> bool:
        """Whether it ended because the loss was no longer finite."""
        return bool(self.rows) and bool(self.rows[-1]["diverged"])

    @property
    def finished(self) -> bool:
        """Whether it has come to its end, or diverged."""
        return self.diverged or len(self.rows) >= self.recipe.epochs

    @property
    def test_accuracy(self) -> float | None:
        """Share of test images classified right after the last row's epoch; None without rows or after divergence."""
        return self.rows[-1]["test_accuracy"] if self.rows else None

    def series(self, *keys: str) -> list[float]:
        """A number of each row, up to the first row that lacks it.

        Example:
            >>> rows = [{"gamma": {"median": 1.0}}, {"gamma": {"median": 1.2}}, {"gamma": None}]
            >>> CellFile("a", Recipe(), [], rows, []).series("gamma", "median")
            [1.0, 1.2]
        """
        found = []
        for row in self.rows:
            value: Any = row
            for key in keys:
                value = None if value is None else value[key]
            if value is None:
                break
            found.append(float(value))
        return found

    def with_row(self, row: Row, measured: Mapping[str, Any], versions: Mapping[str, str]) -> CellFile:
        """With one row more, in the place of those of the same epoch and later."""
        rows = [one for one in self.rows if one["epoch"] < row.epoch] + [dataclasses.asdict(row) | dict(measured)]
        known = list(self.versions)
        return dataclasses.replace(self, rows=rows, versions=known if versions in known else [*known, dict(versions)])

    def write(self, folder: Path) -> None:
        """Write it.

        Raises:
            NormPropError: as `write_whole`.
        """
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False, ensure_ascii=False)
        write_whole(folder / f"{self.cell}.json", (text + "\n").encode())


def read(folder: Path, cell: str) -> CellFile | None:
    """A cell's file in a folder, or None if there is none yet.

    Raises:
        NormPropError: it is damaged.
    """
    path = folder / f"{cell}.json"
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        file = CellFile(**found | {"recipe": Recipe(**ADDED | found["recipe"])})
        assert all(row["epoch"] == i for i, row in enumerate(file.rows, 1))
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise NormPropError(
            f"{path} is no cell of this version: {error or type(error).__name__}\nRemove it, or use another --out."
        ) from error
    return file
