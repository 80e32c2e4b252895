"""`normprop reproduce long`."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from normprop.lab.commands.console import advising, console, on_screen
from normprop.lab.commands.progress import RunDisplay
from normprop.lab.convergence.outcome_table import account, outcome_table
from normprop.lab.convergence.plan import plan
from normprop.lab.convergence.queue import Folders, continue_queue
from normprop.lab.convergence.state_table import State, state_table, states
from normprop.lab.figures.convergence_figure import plot_convergence
from normprop.lab.figures.image import image
from normprop.lab.pages.marked_page import filled
from normprop.lab.samples.datasets import data_root, load
from normprop.lab.whole_file import check_folder, write_whole

OUTCOME, ACCOUNT = "long", "long-account"


def reproduce_long(
    part: Annotated[Literal["long"], tyro.conf.Positional],
    *,
    scale: Literal["smoke", "full"] = "full",
    only: tuple[str, ...] = (),
    list: bool = False,
    report: bool = False,
    out: Path | None = None,
    results: Path | None = None,
    page: Path | None = None,
    device: str = "cpu",
) -> None:
    """Train to the end: NormProp and BatchNorm, each at its own best rate and clipping, network after network.

    The queue takes days of a core. It may be killed at any time: the same command goes on from the last checkpoint, and
    several of them share the cells. Every cell has a small file with a row an epoch.

    Args:
        part: `long`.
        scale: full is CIFAR-10; smoke takes seconds on digits, to see it work.
        only: Names of groups of cells, as --list shows them before the normaliser; by default all.
        list: Train nothing; show what is finished and what is left, with an estimate of the time.
        report: Train nothing; write tables and curves of what there is.
        out: Folder for cells, short runs and checkpoints; by default a folder `long` beside the data sets.
        results: Folder for what --report writes, with copies of the cells; by default `out`.
        page: Markdown page whose generated blocks --report brings up to date.
        device: cpu, cuda, cuda:1, mps …
    """
    assert part == "long"
    cells, screen = plan(scale).on(torch.device(device)).cells(only), console()
    folders = Folders(out or data_root() / "long" / ("" if scale == "full" else scale))
    for folder in (folders.root, results or folders.root):
        check_folder(folder)
    if not (list or report):
        torch.set_num_threads(1 if os.environ.get("OMP_NUM_THREADS") == "1" else torch.get_num_threads())
        with advising(f"The same command goes on; {folders.cells} has a file for each cell."):
            continue_queue(cells, folders, functools.cache(load), device=device, observer=RunDisplay(screen))
    found = states(cells, folders)
    if list or not report:
        screen.print(on_screen(dataclasses.replace(state_table(found), title="Cells")))
        screen.print(state_table(found).note)
    if report:
        _write(found, results or folders.root, page)
        screen.print(on_screen(dataclasses.replace(outcome_table(found), title="Outcome")))
        screen.print(f"Results in {results or folders.root}" + (f" and {page}." if page else "."), soft_wrap=True)


def _write(found: list[State], results: Path, page: Path | None) -> None:
    """The table, the curves, copies of the cells, and the blocks of a page."""
    table = outcome_table(found).markdown()
    write_whole(results / "table.md", f"{table}\n\n{account(found)}\n".encode())
    write_whole(results / "curves.png", image(plot_convergence(found, "mean over seeds, from least to greatest")))
    for state in found:
        if state.file:
            state.file.write(results / "cells")
    if page:
        link = os.path.relpath(results / "curves.png", page.parent).replace(os.sep, "/")
        blocks: dict[str, Any] = {
            OUTCOME: f"{table}\n\n![test accuracy, training loss, drift and γ over epochs]({link})",
            ACCOUNT: account(found),
        }
        write_whole(page, filled(page.read_text() if page.exists() else "# To the end of training\n", blocks).encode())
