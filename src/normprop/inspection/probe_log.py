"""What a probe has logged: a flat dictionary of numbers a step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from normprop.errors import NormPropError

Numbers = Mapping[str, float]
Log = str | Path | Iterable[Numbers]

PREFIX = "normprop"
KEYS = ("mean", "std", "drift")


def key_of(path: str, key: str) -> str:
    """The name of a number: ``normprop/PATH/KEY``."""
    return f"{PREFIX}/{path}/{key}"


def history_of(log: Log) -> dict[str, Any]:
    """A log by module path: the steps, and of each path the values of every number, None where it has none.

    Args:
        log: the file of JSON lines that a probe wrote, or its dictionaries.

    Raises:
        NormPropError: the file cannot be read, or nothing in it is a probe's.

    Example:
        >>> history_of([{"step": 0, "normprop/0/std": 1.0}, {"step": 10, "normprop/0/std": 2.0}])
        {'steps': [0, 10], 'rows': {'0': {'std': [1.0, 2.0]}}}
    """
    records = [record for record in _records(log) if any(name.startswith(f"{PREFIX}/") for name in record)]
    if not records:
        raise NormPropError(
            "the log holds no step of a probe.\nPass the file that MomentProbe(…, log=) wrote, or its dictionaries."
        )
    rows: dict[str, dict[str, list[float | None]]] = {}
    for i, record in enumerate(records):
        for name, value in record.items():
            prefix, _, rest = name.partition("/")
            path, _, key = rest.rpartition("/")
            if prefix == PREFIX and key in KEYS:
                rows.setdefault(path, {}).setdefault(key, [None] * len(records))[i] = value
    return {"steps": [record.get("step", i) for i, record in enumerate(records)], "rows": rows}


def _records(log: Log) -> list[Numbers]:
    if not isinstance(log, str | Path):
        return list(log)
    try:
        lines = Path(log).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise NormPropError(
            f"{log} is no log of a probe: {error}.\nName the file that MomentProbe(…, log=) wrote."
        ) from error
