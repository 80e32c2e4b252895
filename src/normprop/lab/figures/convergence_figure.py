"""How runs came to their end: accuracy, loss, drift and γ over epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from normprop.inspection.figure_style import DPI, TEXT, TITLE, tidy
from normprop.lab.convergence.cell_file import CellFile
from normprop.lab.convergence.plan import NORMS, TITLES
from normprop.lab.convergence.state_table import State
from normprop.lab.figures.panel_grid import draw_band, look_of, mark_epochs

# Title of a column, what it shows of a cell, and whether it is logarithmic.
_PANELS: tuple[tuple[str, Callable[[CellFile], list[float]], bool], ...] = (
    ("test accuracy, %", lambda file: [100 * value for value in file.series("test_accuracy")], False),
    ("training loss", lambda file: file.series("train_loss"), True),
    ("drift, octaves", lambda file: file.series("drift", "rms"), False),
    ("median |γ|", lambda file: file.series("gamma", "median"), False),
)


def plot_convergence(states: Sequence[State], title: str) -> Figure:
    """A row for each group that has begun: the mean over its finished cells, in a band from least to greatest.

    Where no cell of a normaliser is finished, those that are under way are drawn as far as they all are.
    """
    groups = [group for group in dict.fromkeys(state.cell.group for state in states) if _files(states, group.name)]
    figure = Figure(figsize=(13, 0.6 + 2.9 * len(groups)), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=TITLE)
    panels = figure.subplots(max(1, len(groups)), len(_PANELS), squeeze=False)
    handles: dict[str, Artist] = {}
    for row, group in zip(panels, groups, strict=False):
        for axes, (heading, values, logarithmic) in zip(row, _PANELS, strict=True):
            for norm in NORMS:
                files = _files(states, group.name, norm)
                reached = zip(*(values(file) for file in files), strict=False)
                bands = [(min(at), sum(at) / len(at), max(at)) for at in reached]
                if bands:
                    draw_band(axes, bands, look_of(norm) | {"label": TITLES[norm], "markersize": 2.5})
            if logarithmic:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_locator(NullLocator())
            mark_epochs(axes)
            tidy(axes)
            axes.set_title(f"{group.title}: {heading}" if axes is row[0] else heading, loc="left", fontsize=TEXT)
            lines, names = axes.get_legend_handles_labels()
            handles |= dict(zip(names, lines, strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2, frameon=False, fontsize=TEXT)
    return figure


def _files(states: Sequence[State], group: str, norm: str = "") -> list[CellFile]:
    """Of one normaliser the finished ones, if there are any; without a name, whatever has rows."""
    files = [
        state.file
        for state in states
        if state.file and state.file.rows and state.cell.group.name == group and norm in ("", state.cell.norm)
    ]
    finished = [file for file in files if file.finished and not file.diverged]
    return finished or files
