"""The outcome of an experiment's finished runs: curves, means and intervals, in percent."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normprop.lab.comparison.records import Record
from normprop.lab.pages.spread import spread
from normprop.lab.reproduction.runs import Cells, Key

# The finished runs of each cell of an experiment.
Found = Mapping[Key, Sequence[Record]]


def found(cells: Cells, records: Sequence[Record]) -> Found:
    """The records of each cell's finished runs."""
    done = {record.recipe: record for record in records}
    return {key: [done[run] for run in runs if run in done] for key, runs in cells.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval by Student's t, which is infinite for one value.

    Example:
        >>> mean, half = interval([1.0, 2.0, 3.0])
        >>> mean, round(half, 3)
        (2.0, 2.484)
    """
    from scipy.stats import t  # comes with scikit-learn

    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, float("inf")
    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def bands(records: Sequence[Record]) -> list[tuple[float, float]]:
    """`interval` of the validation accuracy after each epoch that all runs reached."""
    return [interval(at) for at in zip(*(record.curve() for record in records), strict=False)]


def best(record: Record) -> float:
    """Highest validation accuracy of a run in %; that of a guess if it diverged at once."""
    return max(record.curve(), default=100 / record.classes)


def last(record: Record) -> float:
    """Validation accuracy after the last epoch in %; that of a guess after divergence."""
    return 100 * record.validation_accuracy


def error_rate(record: Record) -> float:
    """Test error after the last epoch in %; that of a guess after divergence."""
    return 100 * (1 - record.test_accuracy)


def shown(records: Sequence[Record], value: Callable[[Record], float]) -> str:
    """Mean and spread over runs as text, with the number of those that diverged, which count as guesses."""
    diverged = sum(record.diverged for record in records)
    return spread([value(record) for record in records]) + (f" ({diverged} diverged)" if diverged else "")


def plain(found: Found) -> list[dict[str, Any]]:
    """The runs as plain values, for JSON."""
    return [
        {
            "cell": list(key),
            "seed": record.recipe.seed,
            "lr": record.recipe.lr,
            "clip": record.recipe.clip,
            "epochs": record.recipe.epochs,
            "halve_every": record.recipe.halve_every,
            "validation_accuracy": [round(value, 3) for value in record.curve()],
            "test_error": None if record.diverged else round(error_rate(record), 3),
            "diverged": record.diverged,
            "cpu_seconds": round(record.cpu_seconds, 1),
        }
        for key, records in found.items()
        for record in records
    ]
