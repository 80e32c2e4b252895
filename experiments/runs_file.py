"""The runs of an experiment in a file, a line each: what is there isn't done again."""

from __future__ import annotations

import json
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
