"""What a report's user should worry about, found in its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from normprop.inspection import departures, signal_size, units
from normprop.inspection.evidence import Evidence
from normprop.inspection.finding import SEVERITIES, Finding
from normprop.inspection.row import Row

# Each yields what it finds, at its worst place; of findings that are equally severe the first stand first.
SEARCHES: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    signal_size.overflow, departures.unstandardised_input, departures.scarce, signal_size.jump, signal_size.explosion,
    signal_size.collapse, departures.statistics, departures.drift, units.dead, units.saturated, units.mean, units.shape,
)  # fmt: skip


def diagnose(rows: Sequence[Row]) -> tuple[Finding, ...]:
    """Findings in the order of their severity, each kind at its worst place.

    What was measured counts; what was predicted, where nothing was measured. A network whose rows are as they should be has
    none.

    Args:
        rows: of a report.
    """
    evidence = Evidence(rows)
    found = [finding for search in SEARCHES for finding in search(evidence)]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))
