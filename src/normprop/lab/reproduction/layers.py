"""The hidden layers of a run as probes found them, epoch by epoch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from normprop.lab.comparison.records import Record

Layers = Sequence[dict[str, Any]]


def epochs(record: Record) -> list[int]:
    """The epochs after which hidden layers were measured; 0 is before training."""
    return [entry["epoch"] for entry in record.findings]


def tracks(record: Record, *names: str) -> list[list[float]]:
    """A number of every hidden layer over the epochs, such as `tracks(record, "preactivation", "unit_mean")`."""
    return [list(track) for track in zip(*(_read(entry["layers"], names) for entry in record.findings), strict=True)]


def average(record: Record, *names: str) -> list[float]:
    """The absolute value of that number at each epoch, averaged over hidden layers."""
    return [statistics.mean(abs(value) for value in _read(entry["layers"], names)) for entry in record.findings]


def movement(record: Record, *names: str) -> list[float]:
    """The change of that number in each epoch, averaged over hidden layers."""
    lines = tracks(record, *names)
    return [statistics.mean(abs(line[i] - line[i - 1]) for line in lines) for i in range(1, len(record.findings))]


def _read(layers: Layers, names: Sequence[str]) -> list[float]:
    values: list[Any] = list(layers)
    for name in names:
        values = [value[name] for value in values]
    return [float("nan") if value is None else float(value) for value in values]


def plain(record: Record, *names: str) -> list[dict[str, Any]]:
    """The named parts of all findings to four digits, for JSON."""
    return [
        {"epoch": entry["epoch"], "layers": [{name: _rounded(layer[name]) for name in names} for layer in entry["layers"]]}
        for entry in record.findings
    ]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
