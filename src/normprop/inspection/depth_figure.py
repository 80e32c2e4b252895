"""Predicted and measured moments of a network over its depth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normprop.inspection.figure_style import COLOURS, DPI, TEXT, TITLE, tidy
from normprop.inspection.report import Report
from normprop.inspection.row import Row

_PREDICTED, _MEASURED = COLOURS[0], COLOURS[2]
_USUAL = 1.0  # the size of a mean up to which its axis is linear
_LABELS = 24  # paths that fit below the axis


def plot_report(report: Report) -> Figure:
    """A figure with the standard deviation, the mean and the growth of a small change, one point an operation.

    Means and standard deviations are pooled over channels; their axes are logarithmic where they explode. The growth is
    that of a small change of the input relative to the signal, the root of the product of the slopes along the way.

    Args:
        report: of `propagate` or `inspect`; what was not measured is left out.

    Example:
        >>> import torch, normprop
        >>> figure = plot_report(normprop.propagate(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())))
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['standard deviation', 'mean', 'growth of a change']
    """
    rows = list(report)
    figure = Figure(figsize=(9, 7), dpi=DPI, layout="constrained")
    spread, mean, growth = figure.subplots(3, 1, sharex=True)
    summaries = [row.to_dict() for row in rows]
    for axes, key, label in ((spread, "std", "standard deviation"), (mean, "mean", "mean")):
        _lines(axes, [s["predicted"][key] for s in summaries], "predicted", _PREDICTED)
        found = [None if s["measured"] is None else s["measured"][key] for s in summaries]
        if any(value is not None for value in found):
            _lines(axes, found, "measured", _MEASURED)
            axes.legend(frameon=False, fontsize=TEXT)
        axes.set_ylabel(label)
    _lines(growth, [max(row.sensitivity, 0.0) ** 0.5 for row in rows], "", _PREDICTED)
    growth.set_ylabel("growth of a change")
    for axes in (spread, growth):
        values = [y for line in axes.get_lines() for y in line.get_ydata() if y == y]
        if values and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
    sizes = sorted(abs(y) for line in mean.get_lines() for y in line.get_ydata() if y == y and y)
    if sizes and sizes[-1] > 10 * _USUAL:
        mean.set_yscale("symlog", linthresh=_USUAL)
    for axes in figure.axes:
        tidy(axes)
    spread.set_title(report.title, loc="left", fontsize=TITLE)
    _name_places(growth, rows)
    return figure


def _lines(axes: Axes, values: Sequence[float | None], label: str, colour: str) -> None:
    points = [value if value is not None and math.isfinite(value) else math.nan for value in values]
    axes.plot(range(len(points)), points, label=label, color=colour, linewidth=1.4, marker=".", markersize=4)


def _name_places(axes: Axes, rows: Sequence[Row]) -> None:
    step = max(1, -(-len(rows) // _LABELS))
    places = range(0, len(rows), step)
    axes.set_xticks(places, [rows[i].path or rows[i].name for i in places], rotation=60, ha="right", fontsize=7)
