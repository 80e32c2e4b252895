"""What one network costs over others, by batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from normprop.lab.cost.quartiles import Quartiles


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
    with matplotlib.style.context("tableau-colorblind10"):
        figure = Figure(figsize=(4.4 * max(1, len(panels)), 4), dpi=150, layout="constrained")
        places = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
        for axes, (heading, curves) in zip(places, panels.items(), strict=False):
            axes.set_title(heading, fontsize=10)
            _draw(axes, curves)
        places[0].set_ylabel(y_label)
        places[-1].legend(frameon=False, fontsize=9)
        figure.suptitle(title, fontsize=10)
    return figure


def _draw(axes: Axes, curves: Sequence[RatioCurve]) -> None:
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    for i, curve in enumerate(curves):
        quartiles = curve.ratios.values()
        medians = [q.median for q in quartiles]
        bars = [[q.median - q.low for q in quartiles], [q.high - q.median for q in quartiles]]
        shifted = [size * (1 + 0.03 * i) for size in curve.ratios]  # bars of equal sizes side by side
        axes.errorbar(shifted, medians, bars, label=curve.label, marker="osD^v"[i % 5], capsize=3)
    sizes = sorted({size for curve in curves for size in curve.ratios})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch size")
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
