"""Where data depart from what predictions rely on: the input, running statistics, layers and normalisers."""

from __future__ import annotations

from collections.abc import Iterator

from normprop.inspection.evidence import Evidence, finding, others, worst
from normprop.inspection.finding import Finding
from normprop.inspection.row import Row

DRIFT = 1.5  # octaves
SCARCE, MORE = 1e-2, 4.0  # a channel's predicted standard deviation over that of all; the measured one over it
MAGNIFIED = 10.0  # by the site
_EPSILON = 1e-2  # a variance that the ε of usual normalisers changes


def unstandardised_input(evidence: Evidence) -> Iterator[Finding]:
    """Inputs, each, that haven't the mean and standard deviation that predictions begin with."""
    for row in evidence.finite:
        if row.role != "input" or row.measured is None:
            continue
        pooled, expected = (m.pooled(range(m.mean.dim())) for m in (row.measured, row.predicted))
        std, mean = float(pooled.std), float(pooled.mean)
        unit = float(expected.std) or 1.0
        ratio, shift = std / unit, abs(mean - float(expected.mean)) / unit
        if not 0.5 <= ratio <= 2 or shift > 0.5:
            sentence = (
                f"The input {row.name} has mean {mean:.3g} and standard deviation {std:.3g}, not {float(expected.mean):.3g} "
                f"and {float(expected.std):.3g} as predictions take it to have: standardise it, or pass input=."
            )
            yield finding(row, "input", "warning", ratio, sentence)


def statistics(evidence: Evidence) -> Iterator[Finding]:
    """BatchNorms whose running statistics are not those of the data."""
    off = [(drift, row) for row in evidence.finite if _is_batch_norm(row) and (drift := row.drift or 0.0) > DRIFT]
    off = [(drift, row) for drift, row in off if not _too_small(evidence, row)]
    if off:
        drift, row = worst(off)
        sentence = (
            f"Running statistics are not those of the data: behind {evidence.place(row)} the standard deviation is "
            f"{_factor(row)} what γ says{others(off)}. Run the data through the network in training mode."
        )
        yield finding(row, "statistics", "warning", drift, sentence)


def drift(evidence: Evidence) -> Iterator[Finding]:
    """Standard deviations that differ from predictions on which something relies, unless running statistics are to blame."""
    if any(True for _ in statistics(evidence)):
        return
    off = [(octaves, row) for row in evidence.finite if _answers(evidence, row) and (octaves := row.drift or 0.0) > DRIFT]
    if off:
        octaves, row = worst(off)
        sentence = (
            f"Measurement has drifted from prediction: at {evidence.place(row)} the standard deviation is {_factor(row)} "
            f"the predicted one, {octaves:.2g} octaves over channels{others(off)}."
        )
        yield finding(row, "drift", "warning", octaves, sentence)


def scarce(evidence: Evidence) -> Iterator[Finding]:
    """Sites that magnify channels which should hardly vary and do, at the first place: what comes behind follows from it.

    Behind an activation a unit that is off but for its tail has a variance that depends on β/γ exponentially. Where the
    tail is heavier than a Gaussian's, a site that divides by the predicted standard deviation magnifies it without bound.
    """
    found = []
    for row in evidence.finite:
        sources = evidence.around.sources(row)
        if row.operation != "Site" or row.role != "normaliser" or not sources or sources[0].measured is None:
            continue
        std, measured = sources[0].predicted.std, sources[0].measured.std.to(sources[0].predicted.std)
        if not std.shape == measured.shape == row.predicted.std.shape:
            continue
        few = (std > 0) & (std < SCARCE * std.square().mean().sqrt()) & (measured > MORE * std)
        few &= row.predicted.std > MAGNIFIED * std
        if bool(few.any()):
            found.append((float((row.predicted.std / std)[few].max()), row, int(few.sum())))
    if found:
        gain, row, count = found[0]
        sentence = (
            f"{count} of {row.known.var.numel()} channels before {evidence.place(row)} should hardly vary and do: it "
            f"magnifies them up to ×{gain:.3g}{others(found)}. Units before it are almost always off: raise their β."
        )
        yield finding(row, "scarce", "warning", gain, sentence)


def _too_small(evidence: Evidence, row: Row) -> bool:
    """Whether a normaliser's ε hides its input, as it hides that of depthwise convolutions at the start."""
    return row.signal < _expected(row) and all(source.signal**2 < _EPSILON for source in evidence.around.sources(row))


def _answers(evidence: Evidence, row: Row) -> bool:
    """Whether anything relies on a row's prediction."""
    if row.role == "normaliser":
        return True
    return row.role == "linear" and not evidence.around.normalised(row) and not evidence.around.averaged(row)


def _is_batch_norm(row: Row) -> bool:
    return row.role == "normaliser" and "batch" in row.operation.lower().replace("_", "")


def _factor(row: Row) -> str:
    expected = _expected(row)
    return f"{row.signal / expected:.3g} times" if expected else "not"


def _expected(row: Row) -> float:
    return float(row.predicted.var.mean().sqrt())
