"""Learning curves of several settings, each over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe & Ito's palette, told apart with every common colour blindness; styles and markers say the same without colour.
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#555555", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLES = ("-", "--", "-", "--", ":", "-.", "-.")

# Least distance between two labels, as a share of the height of the axes.
_LABEL_STEP = 0.055


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


def plot_curves(
    curves: Sequence[Curve], *, title: str, x_label: str, y_label: str, y_limits: tuple[float, float]
) -> Figure:
    """A figure with a line for each setting's mean, a band from its worst seed to its best, and its name at the end.

    Example:
        >>> curve = Curve("NormProp", [1, 2], [[50, 90], [60, 92]])
        >>> plot_curves([curve], title="t", x_label="epoch", y_label="accuracy", y_limits=(0, 100)).axes[0].get_xlabel()
        'epoch'
    """
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    ends: list[tuple[float, str, str]] = []
    for i, curve in enumerate(curves):
        means, colour = curve.means(), _COLOURS[i % len(_COLOURS)]
        x = curve.x[: len(means)]
        low, high = ([pick(at) for at in zip(*curve.values, strict=False)] for pick in (min, max))
        marker, style = _MARKERS[i % len(_MARKERS)], _STYLES[i % len(_STYLES)]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, means, color=colour, marker=marker, linestyle=style, linewidth=1.8, markersize=5)
        if means:
            ends.append((means[-1], curve.label, colour))
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(*y_limits)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, ends, y_limits)
    return figure


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]], limits: tuple[float, float]) -> None:
    """Write each name beside the end of its line, pushed apart where lines end together."""
    height = limits[1] - limits[0]
    places: list[float] = []
    for end, _, _ in sorted(ends):
        share = (min(max(end, limits[0]), limits[1]) - limits[0]) / height
        places.append(max(share, places[-1] + _LABEL_STEP) if places else share)
    excess = max(0.0, places[-1] - 1) if places else 0.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1 - (len(places) - 1 - i) * _LABEL_STEP) if excess else places[i]
    for place, (_, label, colour) in zip(places, sorted(ends), strict=True):
        axes.text(1.02, place, label, color=colour, transform=axes.transAxes, va="center", fontsize=9)
