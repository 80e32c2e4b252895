"""Panels side by side, in all of which a normaliser looks the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from normprop.inspection.figure_style import COLOURS, DPI, TEXT, TITLE, tidy
from normprop.lab.networks.normalizers import NORMALIZERS

# The palette in three rounds of line styles: a normaliser looks the same in every figure.
_STYLES = ("-", "--", ":")
_MARKERS = "os^DvPX<>phd*8"


def look_of(norm: str) -> dict[str, Any]:
    """The label, colour, line style and marker of a normaliser."""
    place = list(NORMALIZERS).index(norm)
    return {
        "label": norm,
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": _STYLES[place // len(COLOURS)],
        "marker": _MARKERS[place],
        "markersize": 5,
        "linewidth": 1.6,
    }


def make_panels(rows: int, columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    """A figure of equal panels under one title."""
    figure = Figure(figsize=(1.8 + 4.2 * columns, 0.6 + 3.4 * rows), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=TITLE)
    return figure, figure.subplots(rows, columns, squeeze=False, sharey="row").tolist()


def logarithmic(axes: Axes, ticks: Sequence[float], base: int) -> None:
    """Make the axis logarithmic, with ticks at these places."""
    if len(ticks) > 1 and math.log(ticks[-1] / ticks[0]) > 0:
        axes.set_xscale("log", base=base)
    axes.set_xticks(list(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_band(axes: Axes, values: Sequence[tuple[float, float, float]], look: dict[str, Any]) -> None:
    """A line through the means of `(low, mean, high)` after each epoch, in a band from low to high."""
    epochs = range(1, len(values) + 1)
    axes.plot(epochs, [mean for _, mean, _ in values], **look)
    low, high = [low for low, _, _ in values], [high for _, _, high in values]
    if low != high:
        axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, linewidth=0)


def mark_epochs(axes: Axes) -> None:
    """Let the axis count epochs."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def finish(figure: Figure, panels: Sequence[Sequence[Axes]], y_label: str) -> Figure:
    """Grid, labels at the left, and one legend for all panels."""
    names: dict[str, Artist] = {}
    for row in panels:
        row[0].set_ylabel(y_label)
        for axes in row:
            tidy(axes)
            axes.title.set_fontsize(TEXT)
            handles, labels = axes.get_legend_handles_labels()
            names |= dict(zip(labels, handles, strict=True))
    order = [*(name for name in NORMALIZERS if name in names), *(name for name in names if name not in NORMALIZERS)]
    figure.legend([names[name] for name in order], order, loc="outside right center", frameon=False, fontsize=TEXT)
    return figure
