"""The file of finished runs: one line of JSON per run, to which any number of processes append whole lines."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from normprop.errors import NormPropError
from normprop.lab.training.history import Row
from normprop.lab.training.recipe import ADDED, Recipe

RUNS = "runs.jsonl"


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        recipe: With all defaults filled in; two runs with one recipe are the same run.
        rows: One per epoch.
        classes: Number of classes, from which the accuracy of a guess follows.
        cpu_seconds: Processor time, including data and evaluation.
        versions: Versions of the software.
        findings: What a watcher noted before the first epoch and after each; empty without one.
    """

    recipe: Recipe
    rows: tuple[Row, ...]
    classes: int
    cpu_seconds: float
    versions: Mapping[str, str]
    findings: tuple[Any, ...] = ()

    @property
    def diverged(self) -> bool:
        """Whether it ended because the loss was no longer finite."""
        return self.rows[-1].diverged

    @property
    def validation_accuracy(self) -> float:
        """Share of validation samples classified right at the end; that of a guess after divergence."""
        return self._final(self.rows[-1].validation_accuracy)

    @property
    def test_accuracy(self) -> float:
        """Share of test samples classified right at the end; that of a guess after divergence."""
        return self._final(self.rows[-1].test_accuracy)

    def curve(self) -> list[float]:
        """Validation accuracy after each epoch in %, up to the epoch in which the run diverged."""
        return [100 * row.validation_accuracy for row in self.rows if row.validation_accuracy is not None]

    def _final(self, accuracy: float | None) -> float:
        return 1 / self.classes if accuracy is None else accuracy

    def to_line(self) -> bytes:
        """The record as a line of JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """The record that `to_line` wrote.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: for another line.
        """
        found: dict[str, Any] = json.loads(line)
        recipe, rows = Recipe(**ADDED | found.pop("recipe")), tuple(Row(**row) for row in found.pop("rows"))
        return cls(recipe=recipe, rows=rows, findings=tuple(found.pop("findings", ())), **found)


def versions() -> dict[str, str]:
    """The software and hardware that a run depends on besides its recipe."""
    found = {name: importlib.metadata.version(name) for name in ("normprop", "torch")}
    return found | {"python": platform.python_version(), "machine": platform.machine()}


def software(records: Iterable[Record]) -> str:
    """The versions that runs were made with, as text; several if they differ."""
    return "; ".join(sorted({", ".join(f"{k} {v}" for k, v in record.versions.items()) for record in records}))


def read(file: Path) -> list[Record]:
    """The finished runs in a file, each once; none without a file. A last line without its end is left out.

    Raises:
        NormPropError: for a line that is no run.
    """
    if not file.is_file():
        return []
    *lines, _ = file.read_bytes().split(b"\n")
    records: dict[Recipe, Record] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = Record.from_line(line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise NormPropError(
                f"{file}: line {number} is no run of this version: {error}\nRemove the line, or use another --out."
            ) from error
        records.setdefault(record.recipe, record)
    return list(records.values())


def append(file: Path, record: Record) -> None:
    """Add a run and return when it is on the disk; a fragment at the end of the file is cut off first.

    Raises:
        NormPropError: when it can't be written.
    """
    try:
        with _lock(file), file.open("ab+") as opened:
            _cut_fragment(opened)
            opened.write(record.to_line())
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        raise NormPropError(
            f"{file} couldn't be written: {error.strerror or error}.\nFree some space, then repeat the command."
        ) from error


def drop_fragment(file: Path) -> bool:
    """Cut off the part of a line that a killed process left at the end; True if there was one."""
    if not file.is_file():
        return False
    with _lock(file), file.open("ab+") as opened:
        return _cut_fragment(opened)


def _cut_fragment(opened: Any) -> bool:
    opened.seek(0)
    content: bytes = opened.read()
    whole = content.rfind(b"\n") + 1
    opened.truncate(whole)
    return whole < len(content)


def _lock(file: Path) -> FileLock:
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file.with_name(f".{file.name}.lock"))
