"""Figures of a comparison of normalisers: learning curves, accuracy against rate, accuracy against batch size."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normprop.lab.comparison.comparison import Choice, Point, clips_of
from normprop.lab.figures.panel_grid import draw_band, finish, logarithmic, look_of, make_panels, mark_epochs


def plot_curves(choices: Sequence[Choice], title: str) -> Figure:
    """Validation accuracy over epochs of each normaliser's best setting: mean and range of the seeds, by batch size."""
    sizes = _sizes(choices)
    figure, panels = make_panels(1, len(sizes), title)
    for axes, size in zip(panels[0], sizes, strict=True):
        for choice in choices:
            if choice.best.batch_size == size:
                _curve(axes, choice.best)
        axes.set_title(f"batch size {size}")
        mark_epochs(axes)
    return finish(figure, panels, "validation accuracy, %")


def plot_rates(found: Sequence[Point], title: str) -> Figure:
    """Mean validation accuracy against the learning rate: a row for each batch size, a column for each clipping."""
    sizes, clips = sorted({point.batch_size for point in found}), clips_of(found)
    figure, panels = make_panels(len(sizes), len(clips), title)
    for row, size in zip(panels, sizes, strict=True):
        for axes, clip in zip(row, clips, strict=True):
            here = [point for point in found if (point.batch_size, point.clip) == (size, clip)]
            for norm in dict.fromkeys(point.norm for point in here):
                line = [point for point in here if point.norm == norm]
                axes.plot([p.rate for p in line], [100 * p.validation for p in line], **look_of(norm))
            logarithmic(axes, sorted({point.rate for point in found}), base=10)
            axes.set_title(f"batch size {size}, " + (f"clipping {clip:g}" if clip else "no clipping"))
            axes.set_xlabel("rate at batch size 64")
    return finish(figure, panels, "validation accuracy, %")


def plot_batch_sizes(choices: Sequence[Choice], title: str) -> Figure:
    """Test accuracy of each normaliser's best setting against the batch size: mean and standard deviation of seeds."""
    figure, panels = make_panels(1, 1, title)
    axes = panels[0][0]
    for norm in dict.fromkeys(choice.best.norm for choice in choices):
        line = sorted((c.best for c in choices if c.best.norm == norm), key=lambda point: point.batch_size)
        spreads = [100 * (point.spread or 0.0) for point in line]
        axes.errorbar([p.batch_size for p in line], [100 * p.test for p in line], spreads, capsize=3, **look_of(norm))
    logarithmic(axes, _sizes(choices), base=2)
    axes.set_xlabel("batch size")
    return finish(figure, panels, "test accuracy, %")


def _curve(axes: Axes, point: Point) -> None:
    reached = zip(*(record.curve() for record in point.records), strict=False)
    draw_band(axes, [(min(at), sum(at) / len(at), max(at)) for at in reached], look_of(point.norm))


def _sizes(choices: Sequence[Choice]) -> list[int]:
    return sorted({choice.best.batch_size for choice in choices})
