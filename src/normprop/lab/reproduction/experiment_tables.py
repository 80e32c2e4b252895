"""The table of each experiment: what was found, beside what the paper reports."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normprop.lab.comparison.records import Record
from normprop.lab.pages.spread import spread
from normprop.lab.pages.text_table import Table
from normprop.lab.reproduction import layers, published
from normprop.lab.reproduction.outcome import Found, best, error_rate, last, shown
from normprop.lab.reproduction.runs import BATCH_SIZES, CONTENDERS, TITLES, rate
from normprop.lab.reproduction.scale import Scale

PAPER = "the paper"


def fig1(found: Found, scale: Scale) -> Table:
    """Global against batch data normalisation."""
    places = [(mode, size) for size in (50, 100) for mode in ("global", "batch")]
    rows = [[TITLES[n], *(shown(found[n, mode, size], best) for mode, size in places)] for n in CONTENDERS]
    rows.append([f"{PAPER}, NormProp", f"{published.DATA_NORM_BEST} at best, the same for both", "", "", ""])
    return Table(
        ("best validation accuracy, %", *(f"{mode}, batch {size}" for mode, size in places)),
        rows,
        note=f"Data normalisation by statistics of the training set (global) or of the mini-batch (batch). Rates "
        f"{rate(50):g} at batch size 50, {rate(100):g} at 100, halved every {_epochs(scale.data_norm.halve_every)} of "
        f"{scale.data_norm.epochs}; in the paper every 10.",
    )


def fig2(found: Found, _scale: Scale) -> Table:
    """Moments of hidden units."""
    rows = []
    for (name,), records in found.items():
        theirs = {"none-slow": "tens"}.get(name) or f"{published.UNIT_MEAN.get(name, '–')}"
        rows.append([TITLES[name], *(_unit_cells(records[0]) if records and records[0].findings else ["–"] * 7), theirs])
    return Table(
        (
            "after the last epoch",
            "mean of one unit",
            "moved in the last epoch",
            "mean of all units",
            "predicted",
            "std of all units",
            "predicted",
            "drift, octaves",
            f"mean of one unit, {PAPER}",
        ),
        rows,
        note="What enters the activation, on validation images; sizes of means and standard deviations, averaged over the "
        "hidden layers. One unit: the first channel of each layer. Predicted: what the network's parameters say without "
        "data. Drift: log₂ of measured over predicted standard deviation, root mean square over channels.",
    )


def _unit_cells(record: Record) -> list[str]:
    final = [
        layers.average(record, "preactivation", "unit_mean")[-1],
        layers.movement(record, "preactivation", "unit_mean")[-1] if len(record.findings) > 1 else float("nan"),
        *(
            layers.average(record, "preactivation", name)[-1]
            for name in ("mean_size", "predicted_mean_size", "std", "predicted_std", "drift")
        ),
    ]
    return [f"{value:.3g}" for value in final]


def fig3(found: Found, scale: Scale) -> Table:
    """Validation accuracy per epoch."""
    theirs = published.CURVES["paper"]
    epochs = shown_epochs(scale)
    rows = [[TITLES[name], *(_reached(found[name,], epoch) for epoch in epochs)] for name in CONTENDERS]
    for name in ("paper", "paper-clip"):
        rows.append([f"lead of {TITLES[name]} over BatchNorm", *(_lead(found, name, epoch) for epoch in epochs)])
    readings = "; ".join(
        f"{TITLES[norm]} " + ", ".join(f"{value:g} (epoch {epoch})" for epoch, value in published.CURVES[norm].items())
        for norm in ("paper", "batch")
    )
    lead = {epoch: theirs[epoch] - published.CURVES["batch"][epoch] for epoch in theirs}
    return Table(
        ("validation accuracy, %", *(f"epoch {epoch}" for epoch in epochs)),
        rows,
        note=f"Of {scale.usual.epochs} epochs; the paper's run has 200. The paper's figure 3 reads: {readings}. There "
        "NormProp leads by " + ", ".join(f"{value:.1f} (epoch {epoch})" for epoch, value in lead.items()) + " points.",
    )


def shown_epochs(scale: Scale) -> list[int]:
    """The paper's epochs if a run reaches them, else 1, 2, 4 …; and the last one.

    Example:
        >>> from normprop.lab.reproduction.scale import SCALES
        >>> shown_epochs(SCALES["quarter"])
        [1, 2, 4, 8]
        >>> shown_epochs(SCALES["full"])
        [5, 10, 20, 29, 50, 200]
    """
    epochs = scale.usual.epochs
    theirs = list(published.CURVES["paper"])
    early = theirs if epochs >= theirs[-1] else [2**i for i in range(epochs.bit_length()) if 2**i <= epochs]
    return sorted({*early, epochs})


def _at(records: Sequence[Record], epoch: int) -> list[float]:
    """Validation accuracy after an epoch of the runs that reached it."""
    return [line[epoch - 1] for line in (record.curve() for record in records) if len(line) >= epoch]


def _reached(records: Sequence[Record], epoch: int) -> str:
    """Mean and spread after an epoch, with the number of runs that had diverged by then and are left out."""
    lost = len(records) - len(_at(records, epoch))
    return spread(_at(records, epoch)) + (f" ({lost} diverged)" if lost else "")


def _lead(found: Found, name: str, epoch: int) -> str:
    ours, theirs = _at(found[name,], epoch), _at(found["batch",], epoch)
    return f"{statistics.mean(ours) - statistics.mean(theirs):+.1f}" if ours and theirs else "–"


def fig4(found: Found, scale: Scale) -> Table:
    """Batch sizes."""
    ends = {key: shown(records, last) for key, records in found.items()}
    rows = [[TITLES[name], *(ends.get((name, size), "–") for size in BATCH_SIZES)] for name in CONTENDERS]
    rows.append([f"{PAPER}, NormProp", *(f"{published.BATCH_SIZES[size]:.1f}" for size in BATCH_SIZES)])
    return Table(
        ("validation accuracy after the last epoch, %", *(f"batch {size}" for size in BATCH_SIZES)),
        rows,
        note=f"Rates {', '.join(f'{rate(size):.3g}' for size in BATCH_SIZES)}: the power law through the paper's two, .05 "
        f"at 50 and .08 at 100. Batch size 1 has {_epochs(scale.single.epochs)}, the others {scale.usual.epochs}; the "
        "paper's have 200. BatchNorm has no batch size 1.",
    )


def table1(found: Found, scale: Scale) -> Table:
    """Test error."""
    rows = []
    for data, flips in dict.fromkeys((key[0], key[1]) for key in found):
        theirs = published.TEST_ERROR.get((data, flips), {})
        ours = [shown(found[data, flips, name], error_rate) for name in CONTENDERS]
        rows.append(
            [data, "flips" if flips else "none", *ours, *(f"{theirs[n]}" if theirs else "–" for n in ("paper", "batch"))]
        )
    return Table(
        (
            "test error, %",
            "augmentation",
            *(TITLES[name] for name in CONTENDERS),
            f"{PAPER}, NormProp",
            f"{PAPER}, BatchNorm",
        ),
        rows,
        words=(0, 1),
        note=f"After the last epoch; {scale.validation:,} training images are held out in all runs and not trained on.",
    )


def speed(measured: Mapping[str, Any], _scale: Scale) -> Table:
    """Time per epoch."""
    rows = []
    for name in CONTENDERS:
        seconds, ratio = measured[name]["epoch_seconds"], measured[name]["ratio"]
        theirs = published.EPOCH_SECONDS
        rows.append(
            [
                TITLES[name],
                f"{seconds[1]:.3g}",
                f"{ratio[1]:.2f} [{ratio[0]:.2f}–{ratio[2]:.2f}]",
                f"{theirs[name] / theirs['batch']:.3g} ({theirs[name]:g} s)" if name in theirs else "–",
            ]
        )
    clock = "processor time" if measured["clock"] == "cpu" else "time on the clock"
    return Table(
        ("one epoch", "seconds", "ratio to BatchNorm", PAPER),
        rows,
        note=f"Training steps at batch size 50, {clock}, {measured['rounds']} rounds in which the networks take turns, "
        f"{measured['steps']} steps to an epoch, {measured['threads']} thread(s); median, for the ratio with quartiles.",
    )


def bound(found: Found, _scale: Scale) -> Table:
    """Proposition 1, layer by layer."""
    name = next((name for name in ("paper", "paper-clip") if _lasts(found[name,])), None)
    rows = []
    if name:
        start, end = (found[name,][0].findings[i]["layers"] for i in (0, -1))
        names = ("coherence", "bound", "error", "correlation", "deviation")
        rows = [
            [str(i), *(f"{before[quantity]:.3g} → {after[quantity]:.3g}" for quantity in names)]
            for i, (before, after) in enumerate(zip(start, end, strict=True), 1)
        ]
    return Table(
        (
            "hidden layer",
            "coherence μ",
            "bound μ√(m−1)",
            "error for E xxᵀ = I",
            "measured correlation",
            "all that is neglected",
        ),
        rows,
        note=f"{TITLES[name or 'paper']}, before training → after the last epoch; Frobenius norms as shares of the "
        "diagonal's, which is what the method keeps. Error: the proposition's left side, the cosines between filters. "
        "Measured correlation: the same of the units on validation images, whose inputs are correlated. All that is "
        "neglected: ‖Cov u − diag γ²‖ / ‖diag γ²‖. The paper says that the error is small and shows no figure.",
    )


def _lasts(records: Sequence[Record]) -> bool:
    """Whether the first run has findings and didn't diverge."""
    return bool(records) and not records[0].diverged and bool(records[0].findings)


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"


# Headings, in the order of the paper.
HEADINGS = {
    "fig1": "Figure 1: global and batch data normalisation",
    "fig2": "Figure 2: what enters hidden units",
    "fig3": "Figure 3: validation accuracy per epoch",
    "fig4": "Figure 4: batch sizes",
    "table1": "Table 1: test error",
    "speed": "Section 5.6: time per epoch",
    "bound": "Proposition 1: the canonical error bound",
}
PARTS = tuple(HEADINGS)

TABLES: dict[str, Callable[[Any, Scale], Table]] = {
    "fig1": fig1,
    "fig2": fig2,
    "fig3": fig3,
    "fig4": fig4,
    "table1": table1,
    "speed": speed,
    "bound": bound,
}
