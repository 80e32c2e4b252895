"""How figures look: colours, resolution, grid. Those of the commands look alike."""

from __future__ import annotations

from typing import Any

# Okabe & Ito's palette, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#555555")
DPI = 150
TITLE, TEXT = 11, 9  # points


def tidy(axes: Any) -> None:
    """Horizontal lines behind the data of matplotlib's `Axes`, and no box around it."""
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
