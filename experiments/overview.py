"""The table and the picture of docs/results.md, from what the comparisons of `learning.py` found.

python experiments/overview.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from learning import RESULTS, ROOT
from matplotlib.figure import Figure

from normprop.inspection.figure_style import COLOURS, DPI, TEXT, tidy
from normprop.lab.pages.marked_page import filled

PAGE = ROOT / "docs" / "results.md"
FIGURE = RESULTS / "overview" / "overview.png"
# Comparisons, what the page calls them, and batch sizes to show.
SHOWN = {
    "resnet8-small": ("ResNet-8, 4,000 images, 2 epochs", (1, 2, 8)),
    "resnet8": ("ResNet-8, 20,000 images, 3 epochs", (64, 256)),
    "resnet20": ("ResNet-20, 10,000 images, 3 epochs", (64, 256)),
    "nin": ("the paper's network ×0.25, 20,000 images, 3 epochs", (64, 256)),
    "plain12": ("plain, 12 layers ×0.5, Fashion-MNIST, 20,000 images, 3 epochs", (64, 256)),
}
# How the picture shows each column.
LOOKS = {"NormProp": (COLOURS[0], "o"), "BatchNorm": (COLOURS[2], "^"), "best other": (COLOURS[6], "D")}
_NAMES = {"ws": "weight standardisation, GroupNorm", "group": "GroupNorm", "instance": "InstanceNorm"}


@dataclass(frozen=True)
class Line:
    """One network at one batch size: mean and spread of the test accuracy in %, by column; and who the best other is."""

    title: str
    batch_size: int
    found: dict[str, tuple[float, float]]
    other: str


def lines() -> list[Line]:
    """Of all comparisons that are there."""
    found = []
    for name, (title, sizes) in SHOWN.items():
        choices = json.loads((RESULTS / name / "table.json").read_text())["choices"]
        for size in sizes:
            bests = {choice["norm"]: choice["best"] for choice in choices if choice["batch_size"] == size}
            others = {norm: best for norm, best in bests.items() if norm not in ("normprop", "batch")}
            other = max(others, key=lambda norm: float(others[norm]["mean_test_accuracy"]), default="")
            columns = {"NormProp": "normprop", "BatchNorm": "batch", "best other": other}
            values = {column: _value(bests[norm]) for column, norm in columns.items() if norm in bests}
            found.append(Line(title, size, values, other))
    return found


def _value(best: dict[str, Any]) -> tuple[float, float]:
    return 100 * best["mean_test_accuracy"], 100 * (best["standard_deviation"] or 0.0)


def table(found: list[Line]) -> str:
    """A row a line, the highest mean in bold."""
    rows = ["| network | batch | NormProp | BatchNorm | best other |", "|---|---:|---:|---:|---|"]
    for line in found:
        top = max(line.found.values())
        cells = [_cell(line.found.get(column), top) for column in LOOKS]
        if line.other:
            cells[-1] += f", {_NAMES.get(line.other, line.other)}"
        rows.append(f"| {line.title} | {line.batch_size} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(value: tuple[float, float] | None, top: tuple[float, float]) -> str:
    if value is None:
        return "–"
    text = f"{value[0]:.1f} ± {value[1]:.1f}" if value[1] else f"{value[0]:.1f}"
    return f"**{text}**" if value == top else text


def draw(found: list[Line]) -> Figure:
    """A row a line: each column's mean with its spread."""
    figure = Figure(figsize=(9, 0.8 + 0.36 * len(found)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for column, (colour, marker) in LOOKS.items():
        places = [(y, *line.found[column]) for y, line in enumerate(found) if column in line.found]
        rows, means, spreads = zip(*places, strict=True)
        axes.errorbar(means, rows, xerr=spreads, fmt=marker, color=colour, capsize=2, markersize=5, label=column)
    axes.set_yticks(range(len(found)), [f"{line.title}, batch {line.batch_size}" for line in found], fontsize=TEXT)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %")
    tidy(axes)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.7)
    axes.legend(frameon=False, fontsize=TEXT)
    return figure


def main() -> None:
    found = lines()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    draw(found).savefig(FIGURE)
    picture = "![test accuracy of NormProp, BatchNorm and the best other](../experiments/results/overview/overview.png)"
    PAGE.write_text(filled(PAGE.read_text(), {"overview": f"{table(found)}\n\n{picture}"}))


if __name__ == "__main__":
    main()
