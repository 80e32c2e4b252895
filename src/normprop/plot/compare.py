"""Figures of a comparison of normalisers: learning curves, accuracy against rate, accuracy against batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from normprop.experiments.comparison import Choice, Point, clips_of
from normprop.experiments.normalizers import NORMALIZERS

# Okabe & Ito's palette in three rounds of line styles: a normaliser looks the same in every figure, whatever is beside it.
_COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#555555")
_STYLES = ("-", "--", ":")
_MARKERS = "os^DvPX<>phd*8"


def plot_curves(choices: Sequence[Choice], title: str) -> Figure:
    """Validation accuracy over epochs of each normaliser's best setting: mean and range of the seeds, by batch size."""
    sizes = _sizes(choices)
    figure, panels = _panels(1, len(sizes), title)
    for axes, size in zip(panels[0], sizes, strict=True):
        for choice in choices:
            if choice.best.batch_size == size:
                _curve(axes, choice.best)
        axes.set(title=f"batch size {size}", xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(figure, panels, "validation accuracy, %")


def plot_rates(found: Sequence[Point], title: str) -> Figure:
    """Mean validation accuracy against the learning rate: a row for each batch size, a column for each clipping."""
    sizes, clips = sorted({point.batch_size for point in found}), clips_of(found)
    figure, panels = _panels(len(sizes), len(clips), title)
    for row, size in zip(panels, sizes, strict=True):
        for axes, clip in zip(row, clips, strict=True):
            here = [point for point in found if (point.batch_size, point.clip) == (size, clip)]
            for norm in dict.fromkeys(point.norm for point in here):
                line = [point for point in here if point.norm == norm]
                axes.plot([p.rate for p in line], [100 * p.validation for p in line], **_look(norm))
            _logarithmic(axes, sorted({point.rate for point in found}), base=10)
            axes.set_title(f"batch size {size}, " + (f"clipping {clip:g}" if clip else "no clipping"))
            axes.set_xlabel("rate at batch size 64")
    return _finished(figure, panels, "validation accuracy, %")


def plot_batch_sizes(choices: Sequence[Choice], title: str) -> Figure:
    """Test accuracy of each normaliser's best setting against the batch size: mean and standard deviation of seeds."""
    figure, panels = _panels(1, 1, title)
    axes = panels[0][0]
    for norm in dict.fromkeys(choice.best.norm for choice in choices):
        line = sorted((c.best for c in choices if c.best.norm == norm), key=lambda point: point.batch_size)
        spreads = [100 * (point.spread or 0.0) for point in line]
        axes.errorbar([p.batch_size for p in line], [100 * p.test for p in line], spreads, capsize=3, **_look(norm))
    _logarithmic(axes, _sizes(choices), base=2)
    axes.set_xlabel("batch size")
    return _finished(figure, panels, "test accuracy, %")


def _curve(axes: Axes, point: Point) -> None:
    curves = [[row.validation_accuracy for row in record.rows] for record in point.records]
    whole = [[100 * value for value in curve if value is not None] for curve in curves]
    at = [values for values in zip(*whole, strict=False) if values]
    epochs = range(1, len(at) + 1)
    look = _look(point.norm)
    axes.plot(epochs, [sum(values) / len(values) for values in at], **look)
    axes.fill_between(epochs, [min(v) for v in at], [max(v) for v in at], color=look["color"], alpha=0.15, linewidth=0)


def _sizes(choices: Sequence[Choice]) -> list[int]:
    return sorted({choice.best.batch_size for choice in choices})


def _look(norm: str) -> dict[str, Any]:
    place = list(NORMALIZERS).index(norm)
    return {
        "label": norm,
        "color": _COLOURS[place % len(_COLOURS)],
        "linestyle": _STYLES[place // len(_COLOURS)],
        "marker": _MARKERS[place],
        "markersize": 5,
        "linewidth": 1.6,
    }


def _panels(rows: int, columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(1.8 + 4.2 * columns, 0.6 + 3.4 * rows), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False, sharey="row").tolist()


def _logarithmic(axes: Axes, ticks: Sequence[float], base: int) -> None:
    if len(ticks) > 1 and math.log(ticks[-1] / ticks[0]) > 0:
        axes.set_xscale("log", base=base)
    axes.set_xticks(list(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _finished(figure: Figure, panels: Sequence[Sequence[Axes]], y_label: str) -> Figure:
    """Grid, labels at the left, and one legend for all panels."""
    names: dict[str, Artist] = {}
    for row in panels:
        row[0].set_ylabel(y_label)
        for axes in row:
            axes.grid(axis="y", color="#dddddd", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
            axes.title.set_fontsize(9)
            handles, labels = axes.get_legend_handles_labels()
            names |= dict(zip(labels, handles, strict=True))
    order = [name for name in NORMALIZERS if name in names]
    figure.legend([names[name] for name in order], order, loc="outside right center", frameon=False, fontsize=9)
    return figure
