"""Faults of the signal's size: where it is infinite, jumps, explodes or dies out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from normprop.inspection.evidence import Evidence, finding, others, worst
from normprop.inspection.finding import Finding
from normprop.inspection.row import Row

JUMP, ABSORBED_JUMP = 10.0, 16.0  # a layer's growth; before a normaliser, which takes it back
GROWN, SHRUNK = 100.0, 1e-3  # of the whole network, over its input


def overflow(evidence: Evidence) -> Iterator[Finding]:
    """Numbers that are not finite, at the first of them; not within a function, which may be finite as a `where` is."""
    finite = set(evidence.finite)
    bad = [row for row in evidence.rows if row not in finite and not row.inner]
    if bad:
        what = "predicted moments" if bad[0].measured is None else "values"
        sentence = f"The {what} are not finite from {evidence.place(bad[0])} on."
        yield finding(bad[0], "overflow", "error", math.inf, sentence)


def jump(evidence: Evidence) -> Iterator[Finding]:
    """A layer that multiplies the standard deviation; those before a normaliser only if there are no others."""
    jumps = [(growth, row) for row in evidence.finite if (growth := _growth(evidence, row)) > _allowed(evidence, row)]
    if not jumps:
        return
    free = [pair for pair in jumps if not evidence.around.normalised(pair[1])]
    growth, row = worst(free or jumps)
    before = f"{row.signal / growth:.3g} before it, " if row.role != "normaliser" else ""
    size = f"{before}{row.signal:.3g} behind it"
    sentence = f"The standard deviation jumps ×{growth:.3g} at {evidence.place(row)}: {size}, per channel{others(jumps)}."
    if not free:
        sentence += " The normaliser behind it takes that back, but the weight learns as many times more slowly."
    yield finding(row, "jump", "warning" if free else "note", growth, sentence)


def _growth(evidence: Evidence, row: Row) -> float:
    """Standard deviation over that of what goes in; of a normaliser's output, over 1."""
    if row.role == "normaliser":
        return row.signal
    before = max((source.signal for source in evidence.around.sources(row)), default=0.0)
    return row.signal / before if before and row.role in ("linear", "activation", "other") else 0.0


def _allowed(evidence: Evidence, row: Row) -> float:
    return ABSORBED_JUMP if evidence.around.normalised(row) else JUMP


def explosion(evidence: Evidence) -> Iterator[Finding]:
    """A signal that has grown too large on its way, where it is largest."""
    kept = [row for row in evidence.finite if _counts(evidence, row)]
    top = max(kept, key=lambda row: row.signal, default=None)
    start = evidence.start
    if top is None or top.signal <= GROWN * start:
        return
    first = next(row for row in kept if row.signal > GROWN * start)
    number = evidence.around.layer(top)
    each = (top.signal / start) ** (1 / number) if number else 0.0
    pace = f", ×{each:.3g} a layer on average" if number > 1 else ""
    sentence = f"The standard deviation grows from {start:.3g} to {top.signal:.3g} at {evidence.place(top)}{pace}"
    sentence += "." if first is top else f"; it passes {GROWN * start:.3g} at {evidence.place(first)}."
    yield finding(top, "explosion", "warning", top.signal / start, sentence)


def collapse(evidence: Evidence) -> Iterator[Finding]:
    """A signal that dies out, where it is smallest."""
    start = evidence.start
    low = [row for row in evidence.finite if _counts(evidence, row) and 0 < row.signal < SHRUNK * start]
    if low:
        least = min(low, key=lambda row: row.signal)
        sentence = f"The signal dies out: its standard deviation falls from {start:.3g} to {least.signal:.3g} at "
        sentence += evidence.place(least)
        sentence += "." if least is low[0] else f"; it is below a thousandth from {evidence.place(low[0])} on."
        yield finding(least, "collapse", "warning", least.signal / start, sentence)


def _counts(evidence: Evidence, row: Row) -> bool:
    """Whether the size of a row's signal is passed on as it is."""
    if row.role not in ("linear", "activation", "join"):
        return False
    return not evidence.around.normalised(row) and not evidence.around.averaged(row)
