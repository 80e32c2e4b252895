"""Faults of units: dead, saturated, moved by their means alone, or fed with what isn't Gaussian."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from normprop.inspection.evidence import Evidence, Found, finding, last_name, others, worst
from normprop.inspection.finding import Finding
from normprop.inspection.row import Row

IDLE = 0.25  # share of units that never answer
SATURATED = 0.5  # share of values
DOMINANT = 3.0  # means over standard deviations
SKEWED = 0.3  # total variation distance from a Gaussian
_FEW = 64  # values a channel; fewer say little of it

_SUMS = ("linear", "normaliser")  # of many terms: what should be Gaussian
_RECTIFIERS = frozenset("ReLU ReLU6 relu relu_ relu6 clamp_min".split())
# Inputs beyond which a function's slope is below a fiftieth.
_SATURATION = {"tanh": (-2.7, 2.7), "sigmoid": (-3.9, 3.9), "hardtanh": (-1.0, 1.0), "hardsigmoid": (-3.0, 3.0),
               "softsign": (-6.1, 6.1), "erf": (-2.0, 2.0)}  # fmt: skip


def dead(evidence: Evidence) -> Iterator[Finding]:
    """Rectified units that are always 0."""
    found = [(share, row) for before, row in evidence.activations if (share := _idle(before, row)) > IDLE]
    if found:
        share, row = worst(found)
        count = row.known.var.numel()
        sentence = f"{round(share * count)} of {count} units of {evidence.place(row)} are always 0{others(found)}."
        yield finding(row, "dead", "error" if share == 1 else "warning", share, sentence)


def _idle(before: Row, row: Row) -> float:
    if last_name(row) not in _RECTIFIERS:
        return 0.0
    moving = before.known.var > 0
    if row.measured is not None and row.histogram is not None:
        few = row.histogram.count < _FEW * row.measured.var.numel() and row.histogram.count > 0
        return 0.0 if few or not bool(moving.any()) else float(((row.known.second == 0) & moving).double().mean())
    return float((_below(before, 0.0) > 0.999).double().mean())


def saturated(evidence: Evidence) -> Iterator[Finding]:
    """Activations whose inputs lie where they are flat."""
    found: list[Found] = []
    size: dict[str, float] = {}
    for before, row in evidence.activations:
        ends = _SATURATION.get(last_name(row).lower())
        if ends is None:
            continue
        outside = _below(before, ends[0]) + 1 - _below(before, ends[1])
        if (share := float(outside.double().mean())) > SATURATED:
            found.append((share, row))
            size[row.name] = before.signal
    if found:
        share, row = worst(found)
        sentence = f"{evidence.place(row)} is saturated for {share:.0%} of its inputs, whose standard deviation is "
        sentence += f"{size[row.name]:.3g}{others(found)}."
        yield finding(row, "saturated", "warning", share, sentence)


def mean(evidence: Evidence) -> Iterator[Finding]:
    """Means before an activation that dominate what varies, at the first place: what comes behind follows from it."""
    pairs = [before for before, _ in evidence.activations if before.signal and before.role in _SUMS]
    found = [(share, before) for before in pairs if (share := before.offset / before.signal) > DOMINANT]
    if found:
        share, row = found[0]
        sentence = (
            f"Means dominate before the activation at {evidence.place(row)}: over channels they are {share:.3g} times the "
            f"standard deviation{others(found)}."
        )
        yield finding(row, "mean", "warning", share, sentence)


def shape(evidence: Evidence) -> Iterator[Finding]:
    """Values before an activation that are far from Gaussian."""
    found = [
        (before.histogram.distance, before)
        for before, _ in evidence.activations
        if before.role in _SUMS and before.histogram is not None and before.histogram.count > 40 * _FEW
    ]
    found = [pair for pair in found if pair[0] > SKEWED]
    if found:
        distance, row = worst(found)
        sentence = (
            f"What enters the activation at {evidence.place(row)} is far from Gaussian: {distance:.0%} of the values are "
            f"not where a Gaussian has them{others(found)}."
        )
        yield finding(row, "shape", "note", distance, sentence)


def _below(row: Row, bound: float) -> Tensor:
    """Share of each channel's values below a bound, if they are Gaussian."""
    centre, std = row.known.mean.double(), row.known.std.double()
    distance = torch.where(std > 0, (bound - centre) / torch.where(std > 0, std, 1.0), torch.sign(bound - centre) * 1e3)
    below: Tensor = torch.special.ndtr(distance)
    return below
