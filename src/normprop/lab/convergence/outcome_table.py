"""What the cells of a plan ended with: a row for each group and normaliser, and an account of what was not reached."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from normprop.lab.convergence.cell_file import CellFile
from normprop.lab.convergence.plan import NORMS, TITLES, Group
from normprop.lab.convergence.state_table import State
from normprop.lab.pages.spread import spread
from normprop.lab.pages.text_table import Table
from normprop.lab.training.recipe import rate_at

_COLUMNS = (
    "network",
    "normaliser",
    "test, %",
    "training loss",
    "rate",
    "clip",
    "arithmetic",
    "seeds",
    "epochs",
    "drift, octaves",
    "|γ|",
)


def outcome_table(states: Sequence[State]) -> Table:
    """The finished cells of each group, and of those that are under way the last epoch, said to be so."""
    rows = []
    for group in dict.fromkeys(state.cell.group for state in states):
        for norm in NORMS:
            files = [s.file for s in states if s.cell.group is group and s.cell.norm == norm and s.file and s.file.rows]
            finished = [file for file in files if file.finished]
            if shown := finished or files[:1]:
                rows.append(_row(group, norm, shown, finished=bool(finished)))
    note = (
        "Test accuracy and training loss of the last epoch, mean ± standard deviation over seeds. Rate and clipping were "
        "chosen by short runs on validation images, from the same for both; (edge): the best may lie beyond the rates "
        "tried. Drift: log₂ of measured over predicted standard deviation, rms over channels and normalised layers. |γ|: "
        "median, and greatest, over all channels."
    )
    return Table(_COLUMNS, rows, note=note, words=(0, 1))


def _row(group: Group, norm: str, files: Sequence[CellFile], *, finished: bool) -> tuple[str, ...]:
    last = [file.rows[-1] for file in files]
    accuracies = [100 * (row["test_accuracy"] or 0.1) for row in last]
    diverged = sum(file.diverged for file in files)
    drifts = [row["drift"]["rms"] for row in last if row["drift"]]
    gammas = [row["gamma"] for row in last if row["gamma"]]
    recipe = files[0].recipe
    epochs = str(recipe.epochs) if finished else f"{len(files[0].rows)} of {recipe.epochs}"
    return (
        group.title,
        TITLES[norm],
        spread(accuracies, digits=2) + (f" ({diverged} diverged)" if diverged else ""),
        spread([row["train_loss"] for row in last if row["train_loss"] is not None], digits=3),
        f"{recipe.lr:.3g}{' (edge)' if _at_edge(group, recipe.lr or 0.0) else ''}",
        f"{recipe.clip:.3g}" if recipe.clip else "–",
        ", ".join(sorted({file.recipe.dtype for file in files})),
        str(len(files)),
        epochs,
        spread(drifts, digits=2),
        f"{_mean(gammas, 'median'):.2f}, {_mean(gammas, 'greatest'):.2f}" if gammas else "–",
    )


def _mean(gammas: Sequence[dict[str, float]], key: str) -> float:
    return statistics.mean(gamma[key] for gamma in gammas)


def _at_edge(group: Group, lr: float) -> bool:
    ends = (min(group.rates), max(group.rates))
    return any(math.isclose(lr, rate_at(group.base.batch_size, rate), rel_tol=1e-4) for rate in ends)


def account(states: Sequence[State]) -> str:
    """What was run and what was not reached, a line a group."""
    lines = ["| runs | finished | under way | not begun |", "|---|---|---|---|"]
    for group in dict.fromkeys(state.cell.group for state in states):
        mine = [state for state in states if state.cell.group is group]
        begun = [state for state in mine if state.file and not state.finished]
        parts = (
            _names([state for state in mine if state.finished]),
            ", ".join(f"{_name(state)} ({state.words()})" for state in begun) or "–",
            _names([state for state in mine if not state.file]),
        )
        lines.append(f"| {group.title}, {group.base.epochs} epochs | {' | '.join(parts)} |")
    return "\n".join(lines)


def _names(states: Sequence[State]) -> str:
    return ", ".join(map(_name, states)) or "–"


def _name(state: State) -> str:
    return f"{TITLES[state.cell.norm]} {state.cell.seed}"
