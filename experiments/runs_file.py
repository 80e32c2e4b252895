"""The runs of an experiment in a file, a line each: what is there isn't done again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]


def read(path: Path) -> list[Run]:
    """The runs of a file, none if it isn't there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def once(path: Path, runs: list[Run], keys: Sequence[str], what: tuple[Any, ...], train: Callable[[], Run]) -> None:
    """Do a run that isn't among `runs` by what its keys hold, and write it down."""
    if any(tuple(run[k] for k in keys) == what for run in runs):
        return
    runs.append(train())
    with path.open("a") as file:
        file.write(json.dumps(runs[-1]) + "\n")
    print(runs[-1], flush=True)


def chosen(runs: list[Run], **what: Any) -> Run | None:
    """Of the first seed's runs with these values the one that is best on validation data; None if there is none."""
    mine = [run for run in runs if run["seed"] == 0 and all(run[k] == v for k, v in what.items())]
    return max(mine, key=lambda run: run["validation"], default=None)


def over_seeds(runs: list[Run], like: Run, keys: Sequence[str]) -> str:
    """Mean ± standard deviation of the test results of all seeds of a run."""
    found = [run["test"] for run in runs if all(run[k] == like[k] for k in keys if k != "seed")]
    return f"{statistics.mean(found):.1f}" + (f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else "")


def first_seed(runs: list[Run], **what: Any) -> str:
    """The first seed's test result with these values, a dash if it wasn't run."""
    found = [run["test"] for run in runs if run["seed"] == 0 and all(run[k] == v for k, v in what.items())]
    return f"{found[0]:.1f}" if found else "–"
