"""What searches for faults have in hand: rows with finite numbers, what is around them, how to speak of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from normprop.inspection.finding import Finding, Severity
from normprop.inspection.row import Row
from normprop.inspection.surroundings import Surroundings

Found = tuple[float, Row]  # how bad it is, and where


class Evidence:
    """The rows of a report as a search wants them.

    Args:
        rows: of a report.

    Attributes:
        rows: those that hold numbers.
        around: what lies before and behind each.
        finite: rows without infinities and NaN.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if row.known.mean.numel()]
        self.around = Surroundings(rows)
        self.finite = [row for row in self.rows if math.isfinite(row.signal) and math.isfinite(row.offset)]

    @cached_property
    def start(self) -> float:
        """Standard deviation of the input."""
        return max((row.signal for row in self.finite if row.role == "input"), default=0.0) or 1.0

    @cached_property
    def activations(self) -> list[tuple[Row, Row]]:
        """What enters an activation and what leaves it, of tensors with more than a sample's average in them."""
        kept = [row for row in self.finite if row.role == "activation" and not self.around.averaged(row)]
        pairs = [(self.around.sources(row)[0], row) for row in kept if self.around.sources(row)]
        return [pair for pair in pairs if pair[0] in self.finite]

    def place(self, row: Row) -> str:
        """A row's place in words."""
        number = self.around.layer(row)
        count = f", layer {number} of {self.around.layers}" if row.role == "linear" and self.around.layers > 1 else ""
        return f"{row.place} ({row.operation}{count})"


def worst(found: Sequence[Found]) -> Found:
    """The largest, the first of equals."""
    return max(found, key=lambda pair: pair[0])


def others(found: Sequence[object]) -> str:
    """How many places there are beside the one that is spoken of."""
    more = len(found) - 1
    return f" ({more} other place{'s' * (more != 1)} likewise)" if more else ""


def finding(row: Row, kind: str, severity: Severity, value: float, sentence: str) -> Finding:
    """A finding at a row."""
    return Finding(kind, severity, row.name, row.path, value, sentence, row.source)


def last_name(row: Row) -> str:
    """The operation without what it is imported from."""
    return row.operation.rpartition(".")[2]
