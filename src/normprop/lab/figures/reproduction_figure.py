"""The paper's figures with what was found; black marks are what the paper reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normprop.lab.comparison.records import Record
from normprop.lab.figures.panel_grid import draw_band, finish, logarithmic, look_of, make_panels, mark_epochs
from normprop.lab.reproduction import layers, published
from normprop.lab.reproduction.outcome import Found, bands, error_rate, interval, last
from normprop.lab.reproduction.runs import BATCH_SIZES, CONTENDERS, NORM_OF, TITLES

_ACCURACY = "validation accuracy, %"
_PUBLISHED = "the paper's reading"


def plot_fig1(found: Found, title: str) -> Figure:
    """Validation accuracy over epochs: a panel for each batch size, dashed for data normalised by mini-batch."""
    figure, panels = make_panels(1, 2, title)
    for axes, size in zip(panels[0], (50, 100), strict=True):
        for norm in CONTENDERS:
            for mode, style in (("global", "-"), ("batch", "--")):
                changes = {"label": f"{TITLES[norm]}, {mode} data norm.", "linestyle": style}
                _band(axes, found[norm, mode, size], _look(norm) | changes)
        axes.set_title(f"batch size {size}")
        mark_epochs(axes)
    return finish(figure, panels, _ACCURACY)


def plot_fig2(found: Found, title: str) -> Figure:
    """Above the mean of one unit in each hidden layer; below the standard deviation of all units and what was predicted."""
    names = [key[0] for key, records in found.items() if records and records[0].findings]
    figure, panels = make_panels(2, max(1, len(names)), title)
    for upper, lower, name in zip(*panels, names, strict=False):
        record = found[name,][0]
        x = layers.epochs(record)
        lines = layers.tracks(record, "preactivation", "unit_mean")
        for i, line in enumerate(lines):
            upper.plot(x, line, color=_shade(i, len(lines)), linewidth=1.2, label=f"hidden layer {i + 1}")
        upper.set_yscale("symlog", linthresh=1.0)
        upper.set_title(TITLES[name])
        for kind, style in (("std", "-"), ("predicted_std", "--")):
            label = "measured" if kind == "std" else "predicted"
            lower.plot(x, layers.average(record, "preactivation", kind), "k", linestyle=style, label=label)
        lower.set_yscale("log")
        mark_epochs(upper)
        mark_epochs(lower)
    finish(figure, panels, "std of all units")
    panels[0][0].set_ylabel("mean of one unit")
    return figure


def plot_fig3(found: Found, title: str) -> Figure:
    """Validation accuracy over epochs, mean and 95 % confidence interval over seeds; beside it the paper's curves."""
    figure, panels = make_panels(1, 2, title)
    ours, theirs = panels[0]
    for norm in CONTENDERS:
        _band(ours, found[norm,], _look(norm))
    for norm, readings in published.CURVES.items():
        theirs.plot(list(readings), list(readings.values()), **_look(norm))
    ours.set_title("here: mean and 95 % confidence interval")
    theirs.set_title("the paper, read off its figure 3")
    for axes in panels[0]:
        mark_epochs(axes)
    return finish(figure, panels, _ACCURACY)


def plot_fig4(found: Found, title: str) -> Figure:
    """Accuracy against the batch size, then the curves of each batch size for all that normalise."""
    shown = CONTENDERS[:-1]
    figure, panels = make_panels(1, 1 + len(shown), title)
    first, *others = panels[0]
    for norm in CONTENDERS:
        sizes = [size for size in BATCH_SIZES if found.get((norm, size))]
        ends = [interval([last(record) for record in found[norm, size]]) for size in sizes]
        errors = [half if math.isfinite(half) else 0.0 for _, half in ends]
        first.errorbar(sizes, [mean for mean, _ in ends], errors, capsize=3, **_look(norm))
    first.plot(list(published.BATCH_SIZES), list(published.BATCH_SIZES.values()), "kx", label=_PUBLISHED)
    logarithmic(first, BATCH_SIZES, base=2)
    first.set(xlabel="batch size", title="after the last epoch")
    for axes, norm in zip(others, shown, strict=True):
        for i, size in enumerate(BATCH_SIZES):
            if found.get((norm, size)):
                look = {"color": _shade(i, len(BATCH_SIZES)), "label": f"batch size {size}", "linewidth": 1.6}
                _band(axes, found[norm, size], look)
        axes.set_title(TITLES[norm])
        mark_epochs(axes)
    return finish(figure, panels, _ACCURACY)


def plot_table1(found: Found, title: str) -> Figure:
    """Test error by data set and augmentation, with a cross for what the paper reports."""
    figure, panels = make_panels(1, 1, title)
    axes = panels[0][0]
    places = list(dict.fromkeys((key[0], key[1]) for key in found))
    for i, norm in enumerate(CONTENDERS):
        for j, place in enumerate(places):
            errors = [error_rate(record) for record in found[*place, norm]]
            x = j + (i - len(CONTENDERS) / 2) / 10
            axes.plot([x] * len(errors), errors, **_look(norm) | {"linestyle": "none"})
            reading = published.TEST_ERROR.get(place, {}).get(norm)
            if reading is not None:
                axes.plot([x], [reading], "kx", label=_PUBLISHED)
    axes.set_xticks(range(len(places)), [f"{data}, {'flips' if flips else 'no augmentation'}" for data, flips in places])
    return finish(figure, panels, "test error, %")


def plot_speed(measured: Mapping[str, Any], title: str) -> Figure:
    """Time per epoch over BatchNorm's: median and quartiles."""
    figure, panels = make_panels(1, 1, title)
    axes = panels[0][0]
    for i, norm in enumerate(CONTENDERS):
        low, median, high = measured[norm]["ratio"]
        axes.errorbar([i], [median], [[median - low], [high - median]], capsize=4, **_look(norm))
    seconds = published.EPOCH_SECONDS
    for norm in seconds:
        axes.plot([CONTENDERS.index(norm)], [seconds[norm] / seconds["batch"]], "kx", label=_PUBLISHED)
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set_xticks([])
    return finish(figure, panels, "time per epoch / BatchNorm's")


def plot_bound(found: Found, title: str) -> Figure:
    """Proposition 1 over epochs, mean over hidden layers: its bound, its error, and what is measured."""
    names = [norm for norm in CONTENDERS if found[norm,] and found[norm,][0].findings]
    figure, panels = make_panels(1, max(1, len(names)), title)
    labels = {
        "bound": "bound μ√(m−1)",
        "error": "error for E xxᵀ = I",
        "correlation": "measured correlation",
        "deviation": "all that is neglected",
    }
    for axes, norm in zip(panels[0], names, strict=False):
        record = found[norm,][0]
        for i, (name, label) in enumerate(labels.items()):
            axes.plot(layers.epochs(record), layers.average(record, name), color=_shade(i, 4), label=label, linewidth=1.6)
        axes.set_yscale("log")
        axes.set_title(TITLES[norm])
        mark_epochs(axes)
    return finish(figure, panels, "share of the diagonal's norm")


def _look(norm: str) -> dict[str, Any]:
    changes = {"color": "#CC79A7", "marker": "D"} if norm in NORM_OF else {}
    return look_of(NORM_OF.get(norm, norm)) | {"label": TITLES[norm], "markersize": 4} | changes


def _shade(place: int, count: int) -> tuple[float, float, float]:
    """From light to dark blue."""
    share = place / max(1, count - 1)
    return 0.75 * (1 - share), 0.85 - 0.65 * share, 1.0 - 0.55 * share


def _band(axes: Axes, records: Sequence[Record], look: dict[str, Any]) -> None:
    """Mean and 95 % confidence interval; the mean alone where there is one run."""
    band = bands(records) if records else []
    halves = [half if math.isfinite(half) else 0.0 for _, half in band]
    draw_band(axes, [(mean - half, mean, mean + half) for (mean, _), half in zip(band, halves, strict=True)], look)


PLOTS: dict[str, Callable[[Any, str], Figure]] = {
    "fig1": plot_fig1,
    "fig2": plot_fig2,
    "fig3": plot_fig3,
    "fig4": plot_fig4,
    "table1": plot_table1,
    "speed": plot_speed,
    "bound": plot_bound,
}
