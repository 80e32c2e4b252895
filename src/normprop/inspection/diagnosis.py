"""What a report's user should worry about, found in its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from normprop.inspection.finding import SEVERITIES, Finding, Severity
from normprop.inspection.row import Row
from normprop.inspection.surroundings import Surroundings

JUMP, ABSORBED_JUMP = 10.0, 16.0  # a layer's growth; before a normaliser, which takes it back
GROWN, SHRUNK = 100.0, 1e-3  # of the whole network, over its input
DRIFT = 1.5  # octaves
IDLE = 0.25  # share of units that never answer
SATURATED = 0.5  # share of values
DOMINANT = 3.0  # means over standard deviations
SKEWED = 0.3  # total variation distance from a Gaussian
_EPSILON = 1e-2  # a variance that the ε of usual normalisers changes
_FEW = 64  # values a channel; fewer say little of it

_SUMS = ("linear", "normaliser")  # of many terms: what should be Gaussian
_RECTIFIERS = frozenset("ReLU ReLU6 relu relu_ relu6 clamp_min".split())
# Inputs beyond which a function's slope is below a fiftieth.
_SATURATION = {"tanh": (-2.7, 2.7), "sigmoid": (-3.9, 3.9), "hardtanh": (-1.0, 1.0), "hardsigmoid": (-3.0, 3.0),
               "softsign": (-6.1, 6.1), "erf": (-2.0, 2.0)}  # fmt: skip


def diagnose(rows: Sequence[Row]) -> tuple[Finding, ...]:
    """Findings in the order of their severity, each kind at its worst place.

    What was measured counts; what was predicted, where nothing was measured. A network whose rows are as they should be has
    none.

    Args:
        rows: of a report.
    """
    return _Diagnosis(rows).findings()


class _Diagnosis:
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if row.known.mean.numel()]
        self.around = Surroundings(rows)
        self.finite = [row for row in self.rows if math.isfinite(row.signal) and math.isfinite(row.offset)]

    @cached_property
    def start(self) -> float:
        """Standard deviation of the input."""
        return max((row.signal for row in self.finite if row.role == "input"), default=0.0) or 1.0

    def findings(self) -> tuple[Finding, ...]:
        searches: tuple[Callable[[], Iterator[Finding]], ...] = (
            self._overflow, self._input, self._jump, self._explosion, self._collapse, self._statistics, self._drift,
            self._dead, self._saturated, self._mean, self._shape,
        )  # fmt: skip
        found = [finding for search in searches for finding in search()]
        return tuple(sorted(found, key=lambda f: SEVERITIES.index(f.severity)))

    def _overflow(self) -> Iterator[Finding]:
        bad = [row for row in self.rows if row not in self.finite]
        if bad:
            what = "predicted moments" if bad[0].measured is None else "values"
            yield _at(bad[0], "overflow", "error", math.inf, f"The {what} are not finite from {self._place(bad[0])} on.")

    def _jump(self) -> Iterator[Finding]:
        jumps = [(growth, row) for row in self.finite if (growth := self._growth(row)) > self._allowed(row)]
        if not jumps:
            return
        free = [jump for jump in jumps if not self.around.normalised(jump[1])]
        growth, row = max(free or jumps, key=lambda jump: jump[0])
        before = f"{row.signal / growth:.3g} before it, " if row.role != "normaliser" else ""
        size = f"{before}{row.signal:.3g} behind it"
        sentence = f"The standard deviation jumps ×{growth:.3g} at {self._place(row)}: {size}, per channel{_others(jumps)}."
        if not free:
            sentence += " The normaliser behind it takes that back, but the weight learns as many times more slowly."
        yield _at(row, "jump", "warning" if free else "note", growth, sentence)

    def _growth(self, row: Row) -> float:
        """Standard deviation over that of what goes in; of a normaliser's output, over 1."""
        if row.role == "normaliser":
            return row.signal
        before = max((source.signal for source in self.around.sources(row)), default=0.0)
        return row.signal / before if before and row.role in ("linear", "activation", "other") else 0.0

    def _allowed(self, row: Row) -> float:
        return ABSORBED_JUMP if self.around.normalised(row) else JUMP

    def _explosion(self) -> Iterator[Finding]:
        kept = [row for row in self.finite if self._counts(row)]
        top = max(kept, key=lambda row: row.signal, default=None)
        if top is None or top.signal <= GROWN * self.start:
            return
        first = next(row for row in kept if row.signal > GROWN * self.start)
        number = self.around.layer(top)
        each = (top.signal / self.start) ** (1 / number) if number else 0.0
        pace = f", ×{each:.3g} a layer on average" if number > 1 else ""
        sentence = f"The standard deviation grows from {self.start:.3g} to {top.signal:.3g} at {self._place(top)}{pace}"
        sentence += "." if first is top else f"; it passes {GROWN * self.start:.3g} at {self._place(first)}."
        yield _at(top, "explosion", "warning", top.signal / self.start, sentence)

    def _collapse(self) -> Iterator[Finding]:
        low = [row for row in self.finite if self._counts(row) and 0 < row.signal < SHRUNK * self.start]
        if low:
            worst = min(low, key=lambda row: row.signal)
            sentence = f"The signal dies out: its standard deviation falls from {self.start:.3g} to {worst.signal:.3g} at "
            sentence += f"{self._place(worst)}."
            if worst is not low[0]:
                sentence = f"{sentence[:-1]}; it is below a thousandth from {self._place(low[0])} on."
            yield _at(worst, "collapse", "warning", worst.signal / self.start, sentence)

    def _counts(self, row: Row) -> bool:
        """Whether the size of a row's signal is passed on as it is."""
        if row.role not in ("linear", "activation", "join"):
            return False
        return not self.around.normalised(row) and not self.around.averaged(row)

    def _statistics(self) -> Iterator[Finding]:
        off = [(drift, row) for row in self.finite if _is_batch_norm(row) and (drift := row.drift or 0.0) > DRIFT]
        off = [(drift, row) for drift, row in off if not self._too_small(row)]
        if off:
            drift, row = max(off, key=lambda pair: pair[0])
            sentence = (
                f"Running statistics are not those of the data: behind {self._place(row)} the standard deviation is "
                f"{_factor(row)} what γ says{_others(off)}. Run the data through the network in training mode."
            )
            yield _at(row, "statistics", "warning", drift, sentence)

    def _too_small(self, row: Row) -> bool:
        """Whether a normaliser's ε hides its input, as it hides that of depthwise convolutions at the start."""
        return row.signal < _expected(row) and all(source.signal**2 < _EPSILON for source in self.around.sources(row))

    def _drift(self) -> Iterator[Finding]:
        if any(True for _ in self._statistics()):
            return
        off = [(drift, row) for row in self.finite if self._answers(row) and (drift := row.drift or 0.0) > DRIFT]
        if off:
            drift, row = max(off, key=lambda pair: pair[0])
            sentence = (
                f"Measurement has drifted from prediction: at {self._place(row)} the standard deviation is {_factor(row)} "
                f"the predicted one, {drift:.2g} octaves over channels{_others(off)}."
            )
            yield _at(row, "drift", "warning", drift, sentence)

    def _answers(self, row: Row) -> bool:
        """Whether anything relies on a row's prediction."""
        if row.role == "normaliser":
            return True
        return row.role == "linear" and not self.around.normalised(row) and not self.around.averaged(row)

    def _dead(self) -> Iterator[Finding]:
        found = [(share, row) for row in self._activations() if (share := self._idle(row)) > IDLE]
        if found:
            share, row = max(found, key=lambda pair: pair[0])
            count = row.known.var.numel()
            sentence = f"{round(share * count)} of {count} units of {self._place(row)} are always 0{_others(found)}."
            yield _at(row, "dead", "error" if share == 1 else "warning", share, sentence)

    def _idle(self, row: Row) -> float:
        if _last_name(row) not in _RECTIFIERS:
            return 0.0
        before = self.around.sources(row)[0]
        moving = before.known.var > 0
        if row.measured is not None and row.histogram is not None:
            few = row.histogram.count < _FEW * row.measured.var.numel() and row.histogram.count > 0
            return 0.0 if few or not bool(moving.any()) else float(((row.known.second == 0) & moving).double().mean())
        return float((_below(before, 0.0) > 0.999).double().mean())

    def _saturated(self) -> Iterator[Finding]:
        found = []
        for row in self._activations():
            ends = _SATURATION.get(_last_name(row).lower())
            if ends is None:
                continue
            before = self.around.sources(row)[0]
            outside = _below(before, ends[0]) + 1 - _below(before, ends[1])
            if (share := float(outside.double().mean())) > SATURATED:
                found.append((share, row))
        if found:
            share, row = max(found, key=lambda pair: pair[0])
            before = self.around.sources(row)[0]
            sentence = f"{self._place(row)} is saturated for {share:.0%} of its inputs, whose standard deviation is "
            sentence += f"{before.signal:.3g}{_others(found)}."
            yield _at(row, "saturated", "warning", share, sentence)

    def _mean(self) -> Iterator[Finding]:
        found = []
        for row in self._activations():
            before = self.around.sources(row)[0]
            if before.signal and before.role in _SUMS and (share := before.offset / before.signal) > DOMINANT:
                found.append((share, before))
        if found:
            share, row = found[0]  # what comes behind follows from it
            sentence = (
                f"Means dominate before the activation at {self._place(row)}: over channels they are {share:.3g} times the "
                f"standard deviation{_others(found)}."
            )
            yield _at(row, "mean", "warning", share, sentence)

    def _activations(self) -> list[Row]:
        """Activations of tensors with more than a sample's average in them."""
        kept = [row for row in self.finite if row.role == "activation" and not self.around.averaged(row)]
        return [row for row in kept if self.around.sources(row) and self.around.sources(row)[0] in self.finite]

    def _input(self) -> Iterator[Finding]:
        for row in self.finite:
            if row.role != "input" or row.measured is None:
                continue
            pooled, expected = (m.pooled(range(m.mean.dim())) for m in (row.measured, row.predicted))
            std, mean = float(pooled.std), float(pooled.mean)
            ratio = std / (float(expected.std) or 1.0)
            shift = abs(mean - float(expected.mean)) / (float(expected.std) or 1.0)
            if not 0.5 <= ratio <= 2 or shift > 0.5:
                told = f"{float(expected.mean):.3g} and {float(expected.std):.3g}"
                sentence = f"The input {row.name} has mean {mean:.3g} and standard deviation {std:.3g}, not "
                sentence += f"{told} as predictions take it to have: standardise it, or pass input=."
                yield _at(
                    row,
                    "input",
                    "warning",
                    ratio,
                    f"{sentence}not {told} as predictions take it to have: standardise it, or pass input=.",
                )

    def _shape(self) -> Iterator[Finding]:
        found = []
        for row in self._activations():
            before = self.around.sources(row)[0]
            if before.role in _SUMS and before.histogram is not None and before.histogram.count > 40 * _FEW:
                found.append((before.histogram.distance, before))
        found = [pair for pair in found if pair[0] > SKEWED]
        if found:
            distance, row = max(found, key=lambda pair: pair[0])
            sentence = (
                f"What enters the activation at {self._place(row)} is far from Gaussian: {distance:.0%} of the values are "
                f"not where a Gaussian has them{_others(found)}."
            )
            yield _at(row, "shape", "note", distance, sentence)

    def _place(self, row: Row) -> str:
        number = self.around.layer(row)
        count = f", layer {number} of {self.around.layers}" if row.role == "linear" and self.around.layers > 1 else ""
        return f"{row.place} ({row.operation}{count})"


def _at(row: Row, kind: str, severity: Severity, value: float, sentence: str) -> Finding:
    return Finding(kind, severity, row.name, row.path, value, sentence, row.source)


def _others(found: Sequence[object]) -> str:
    more = len(found) - 1
    return f" ({more} other place{'s' * (more != 1)} likewise)" if more else ""


def _factor(row: Row) -> str:
    expected = _expected(row)
    return f"{row.signal / expected:.3g} times" if expected else "not"


def _expected(row: Row) -> float:
    return float(row.predicted.var.mean().sqrt())


def _last_name(row: Row) -> str:
    return row.operation.rpartition(".")[2]


def _is_batch_norm(row: Row) -> bool:
    return row.role == "normaliser" and "batch" in row.operation.lower().replace("_", "")


def _below(row: Row, bound: float) -> Tensor:
    """Share of each channel's values below a bound, if they are Gaussian."""
    mean, std = row.known.mean.double(), row.known.std.double()
    distance = torch.where(std > 0, (bound - mean) / torch.where(std > 0, std, 1.0), torch.sign(bound - mean) * 1e3)
    below: Tensor = torch.special.ndtr(distance)
    return below
