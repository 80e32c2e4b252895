"""What the finished runs of an experiment come to: curves, means and intervals, in percent."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normprop.lab.comparison.records import Record
from normprop.lab.reproduction.runs import Cells, Key

# The finished runs of each cell of an experiment.
Found = Mapping[Key, Sequence[Record]]


def found(cells: Cells, records: Sequence[Record]) -> Found:
    """The records of each cell's runs, those that are finished."""
    done = {record.recipe: record for record in records}
    return {key: [done[run] for run in runs if run in done] for key, runs in cells.items()}


def curve(record: Record) -> list[float]:
    """Validation accuracy after each epoch in %, up to the epoch in which the run diverged."""
    return [100 * row.validation_accuracy for row in record.rows if row.validation_accuracy is not None]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval by Student's t; infinite for one value.

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
    return [interval(at) for at in zip(*map(curve, records), strict=False)]


def best(record: Record) -> float:
    """Highest validation accuracy of a run, %; a guess for one that diverged at once."""
    return max(curve(record), default=100 / record.classes)


def last(record: Record) -> float:
    """Validation accuracy after the last epoch, %; a guess after divergence."""
    return 100 * record.validation_accuracy


def error_rate(record: Record) -> float:
    """Share of test images classified wrong after the last epoch, %; that of a guess after divergence."""
    return 100 * (1 - record.test_accuracy)


def shown(records: Sequence[Record], value: Callable[[Record], float]) -> str:
    """Mean and spread over runs as text, with a word on those that diverged, which count as guesses."""
    diverged = sum(record.diverged for record in records)
    return spread([value(record) for record in records]) + (f" ({diverged} diverged)" if diverged else "")


def spread(values: Sequence[float], *, digits: int = 1) -> str:
    """Mean ± standard deviation as text.

    Example:
        >>> spread([70.0, 72.0]), spread([70.0]), spread([])
        ('71.0 ± 1.4', '70.0', '–')
    """
    if not values:
        return "–"
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


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
            "validation_accuracy": [round(value, 3) for value in curve(record)],
            "test_error": None if record.diverged else round(error_rate(record), 3),
            "diverged": record.diverged,
            "cpu_seconds": round(record.cpu_seconds, 1),
        }
        for key, records in found.items()
        for record in records
    ]
