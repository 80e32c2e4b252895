"""Learning curves of several settings, each over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Okabe & Ito's palette, told apart with every common colour blindness; styles and markers say the same without colour.
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#555555", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLES = ("-", "--", "-", "--", ":", "-.", "-.")

# Least distance between two labels, as a share of the height of the axes.
_LABEL_STEP = 0.06


@dataclass(frozen=True)
class Curve:
    """One setting: `values[seed][i]` at `x[i]`; a seed that stopped early has fewer."""

    label: str
    x: Sequence[float]
    values: Sequence[Sequence[float]]

    def means(self) -> list[float]:
        """Mean over the seeds at each point that all of them reached.

        Example:
            >>> Curve("a", [1, 2], [[0.0, 1.0], [1.0]]).means()
            [0.5]
        """
        return [sum(at) / len(at) for at in zip(*self.values, strict=False)]


def plot_curves(curves: Sequence[Curve], *, title: str, x_label: str, y_label: str, log: bool = False) -> Figure:
    """A figure with a line for each setting's mean, a band from its worst seed to its best, and its name at the end.

    Args:
        curves: In the order of their colours; give relatives neighbouring places.
        title: What was done, in a line.
        x_label: Quantity and unit.
        y_label: Quantity and unit.
        log: Whether equal distances mean equal factors; all values must be above 0 then.

    Example:
        >>> curve = Curve("NormProp", [1, 2], [[50, 9], [60, 8]])
        >>> plot_curves([curve], title="t", x_label="epoch", y_label="error, %", log=True).axes[0].get_xlabel()
        'epoch'
    """
    figure = Figure(figsize=(8, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    for i, curve in enumerate(curves):
        means, colour = curve.means(), _COLOURS[i % len(_COLOURS)]
        x = curve.x[: len(means)]
        low, high = ([pick(at) for at in zip(*curve.values, strict=False)] for pick in (min, max))
        marker, style = _MARKERS[i % len(_MARKERS)], _STYLES[i % len(_STYLES)]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, means, color=colour, marker=marker, linestyle=style, linewidth=1.8, markersize=5)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, curves)
    return figure


def _label_ends(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write each name at the right, joined to the end of its line, pushed apart where lines end together."""
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # limits are found lazily, and places depend on them
    ends: list[tuple[float, float, str, str]] = []
    to_axes = axes.transData + axes.transAxes.inverted()
    for i, curve in enumerate(curves):
        means = curve.means()
        if means:
            x, y = to_axes.transform((curve.x[len(means) - 1], means[-1]))
            ends.append((y, x, curve.label, _COLOURS[i % len(_COLOURS)]))
    ends.sort()
    places = _apart([end[0] for end in ends])
    for place, (y, x, label, colour) in zip(places, ends, strict=True):
        axes.plot([x, 1.03], [y, place], transform=axes.transAxes, color=colour, linewidth=0.8, clip_on=False)
        axes.text(1.04, place, label, color="#222222", transform=axes.transAxes, va="center", fontsize=9)


def _apart(heights: Sequence[float]) -> list[float]:
    """Sorted heights between 0 and 1, moved as little as a sweep up and a sweep down can until labels don't touch.

    Example:
        >>> [round(h, 3) for h in _apart([0.5, 0.51, 0.99, 1.0])]
        [0.5, 0.56, 0.94, 1.0]
    """
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + _LABEL_STEP) if places else height)
    ceiling = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - _LABEL_STEP
    return places
