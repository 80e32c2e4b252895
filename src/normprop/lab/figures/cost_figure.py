"""The figure of one network's cost over that of others, by batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normprop.inspection.figure_style import COLOURS
from normprop.lab.cost.quartiles import Quartiles
from normprop.lab.figures.panel_grid import finish, logarithmic, make_panels


@dataclass(frozen=True)
class RatioCurve:
    """The ratio to one rival, by batch size."""

    label: str
    ratios: Mapping[int, Quartiles]


def plot_ratios(panels: Mapping[str, Sequence[RatioCurve]], *, title: str, y_label: str) -> Figure:
    """A panel for each kind of work with a line for each rival and bars from quartile to quartile; 1 is marked.

    Args:
        panels: From a panel's heading to its curves.
        title: What was measured, in a line.
        y_label: What the ratio is of.

    Example:
        >>> curve = RatioCurve("BatchNorm", {1: Quartiles(0.8, 0.9, 1.0), 8: Quartiles(0.7, 0.8, 0.9)})
        >>> [axes.get_title() for axes in plot_ratios({"training": [curve]}, title="t", y_label="ratio").axes]
        ['training']
    """
    figure, places = make_panels(1, len(panels), title)
    for axes, (heading, curves) in zip(places[0], panels.items(), strict=True):
        axes.set_title(heading)
        _draw(axes, curves)
    return finish(figure, places, y_label)


def _draw(axes: Axes, curves: Sequence[RatioCurve]) -> None:
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    for i, curve in enumerate(curves):
        quartiles = curve.ratios.values()
        medians = [q.median for q in quartiles]
        bars = [[q.median - q.low for q in quartiles], [q.high - q.median for q in quartiles]]
        shifted = [size * (1 + 0.03 * i) for size in curve.ratios]  # bars of equal sizes side by side
        axes.errorbar(
            shifted, medians, bars, label=curve.label, marker="osD^v"[i % 5], color=COLOURS[i % len(COLOURS)], capsize=3
        )
    logarithmic(axes, sorted({size for curve in curves for size in curve.ratios}), base=2)
    axes.set_xlabel("batch size")
