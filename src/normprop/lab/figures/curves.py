"""Learning curves of several settings, each over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from normprop.inspection.figure_style import COLOURS, DPI, TEXT, TITLE, tidy
from normprop.lab.figures.panel_grid import draw_band, mark_epochs

# Styles and markers say the same without colour.
_LOOKS = (
    (COLOURS[0], "o", "-"),
    (COLOURS[5], "s", "--"),
    (COLOURS[2], "^", "-"),
    (COLOURS[1], "D", "--"),
    (COLOURS[6], "v", ":"),
    (COLOURS[3], "P", "-."),
    (COLOURS[4], "X", "-."),
)

# Least distance between two labels, as a share of the height of the axes.
_LABEL_STEP = 0.06


@dataclass(frozen=True)
class Curve:
    """One setting: `values[seed][i]` after epoch i + 1; a seed that stopped early has fewer."""

    label: str
    values: Sequence[Sequence[float]]

    def bands(self) -> list[tuple[float, float, float]]:
        """Least, mean and greatest value over the seeds after each epoch that all of them reached.

        Example:
            >>> Curve("a", [[0.0, 1.0], [1.0]]).bands()
            [(0.0, 0.5, 1.0)]
        """
        return [(min(at), sum(at) / len(at), max(at)) for at in zip(*self.values, strict=False)]


def plot_curves(curves: Sequence[Curve], *, title: str, y_label: str, log: bool = False) -> Figure:
    """A figure with a line for each setting's mean, a band from its worst seed to its best, and its name at the end.

    Args:
        curves: In the order of their colours; give relatives neighbouring places.
        title: What was done, in a line.
        y_label: Quantity and unit.
        log: Whether equal distances mean equal factors; all values must be above 0 then.

    Example:
        >>> curve = Curve("NormProp", [[50, 9], [60, 8]])
        >>> plot_curves([curve], title="t", y_label="error, %", log=True).axes[0].get_xlabel()
        'epoch'
    """
    figure = Figure(figsize=(8, 4.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    for i, curve in enumerate(curves):
        colour, marker, style = _LOOKS[i % len(_LOOKS)]
        look = {"color": colour, "marker": marker, "linestyle": style, "linewidth": 1.8, "markersize": 5}
        draw_band(axes, curve.bands(), look)
    axes.set_title(title, loc="left", fontsize=TITLE)
    axes.set_ylabel(y_label)
    mark_epochs(axes)
    tidy(axes)
    _label_ends(axes, curves)
    return figure


def _label_ends(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write each name at the right, joined to the end of its line, pushed apart where lines end together."""
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # limits are found lazily, and places depend on them
    ends: list[tuple[float, float, str, str]] = []
    to_axes = axes.transData + axes.transAxes.inverted()
    for i, curve in enumerate(curves):
        if bands := curve.bands():
            x, y = to_axes.transform((len(bands), bands[-1][1]))
            ends.append((y, x, curve.label, _LOOKS[i % len(_LOOKS)][0]))
    ends.sort()
    places = _apart([end[0] for end in ends])
    for place, (y, x, label, colour) in zip(places, ends, strict=True):
        axes.plot([x, 1.03], [y, place], transform=axes.transAxes, color=colour, linewidth=0.8, clip_on=False)
        axes.text(1.04, place, label, color="#222222", transform=axes.transAxes, va="center", fontsize=TEXT)


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
