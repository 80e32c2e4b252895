"""Working through a plan: each cell from where it stopped, its file renewed after every epoch."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from normprop.errors import NormPropError
from normprop.lab.claim import claimed
from normprop.lab.comparison import records
from normprop.lab.convergence import cell_file, choice
from normprop.lab.convergence.cell_file import CellFile
from normprop.lab.convergence.plan import Cell
from normprop.lab.convergence.pulse import pulse
from normprop.lab.samples.images import Images
from normprop.lab.samples.seeds import derived
from normprop.lab.training.history import Row
from normprop.lab.training.loop import CHECKPOINT, train
from normprop.lab.training.observer import Observer
from normprop.lab.training.preparation import placed, some
from normprop.lab.training.processes import Processes
from normprop.lab.training.recipe import Recipe

# Training samples on which drift is measured.
_PROBED = 256


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where a queue keeps what it does: files of cells, short runs by group, and what resuming needs."""

    root: Path

    @property
    def cells(self) -> Path:
        """Of the cells' files."""
        return self.root / "cells"

    def choice(self, cell: Cell) -> Path:
        """Of the short runs for a cell, shared by the cells of a group."""
        return self.root / "choice" / cell.group.name

    def state(self, cell: Cell) -> Path:
        """Of a cell's checkpoint."""
        return self.root / "state" / cell.name


def continue_queue(
    cells: Sequence[Cell],
    folders: Folders,
    load: Callable[[str], Images],
    *,
    device: str = "cpu",
    observer: Observer | None = None,
) -> None:
    """Train what is missing, in order. Several processes may do so at once: a cell is locked while it is trained.

    Args:
        cells: In the order in which they are to be trained.
        folders: Where everything is kept.
        load: Gives a data set by name.
        device: The device to compute on.
        observer: Told how each run goes.

    Raises:
        NormPropError: results that can't be written or read.
    """
    for cell in cells:
        with claimed(folders.root / ".locks" / cell.name) as mine:
            if mine:
                _finish(cell, folders, load, device, observer or Observer())


def _finish(
    cell: Cell,
    folders: Folders,
    load: Callable[[str], Images],
    device: str,
    observer: Observer,
) -> None:
    file = cell_file.read(folders.cells, cell.name)
    if file is not None and file.finished:
        shutil.rmtree(folders.state(cell), ignore_errors=True)
        return
    images = load(cell.group.base.data)
    if file is None:
        file = _chosen_before(cell, folders)
        if file is None:
            runs = choice.try_all(cell, folders.choice(cell), images, device)
            if len(runs) < len(cell.group.candidates(cell.norm)):
                return  # another process is choosing
            file = CellFile(cell.name, choice.chosen(cell, runs), choice.account(runs), [], [])
        file.write(folders.cells)
    recording = _Recording(cell, file, folders, images, observer)
    resume = (folders.state(cell) / CHECKPOINT).exists()
    if len(file.rows) > 1 and not resume:  # a row is written before the checkpoint, so that one row alone may lack it
        raise NormPropError(
            f"{cell.name} has {len(file.rows)} epochs and no checkpoint in {folders.state(cell)}.\n"
            f"Restore it, or remove {folders.cells / (cell.name + '.json')} to train the cell again."
        )
    train(file.recipe, out=folders.state(cell), resume=resume, device=device, images=images, observer=recording)
    shutil.rmtree(folders.state(cell), ignore_errors=True)


def _chosen_before(cell: Cell, folders: Folders) -> CellFile | None:
    """A fresh file with the choice that another seed's has, of the same group and normaliser; None without one."""
    for seed in cell.group.seeds:
        other = cell_file.read(folders.cells, dataclasses.replace(cell, seed=seed).name)
        if other is not None and other.choice:
            recipe = cell.group.recipe(cell.norm, cell.seed, other.recipe.lr, other.recipe.clip)
            return CellFile(cell.name, recipe, other.choice, [], [])
    return None


class _Recording(Observer):
    """Renews a cell's file after each epoch, and passes on what it is told."""

    def __init__(
        self,
        cell: Cell,
        file: CellFile,
        folders: Folders,
        images: Images,
        observer: Observer,
    ) -> None:
        self.file, self.folders, self.observer = file, folders, observer
        self.samples = some(images, derived(cell.seed, -3), _PROBED)
        self.model: nn.Module = nn.Identity()
        self.versions = records.versions()

    def started(self, recipe: Recipe, model: nn.Module, optimizer: Optimizer, *, train: int, test: int) -> None:
        """Keep the network."""
        self.model = model
        self.observer.started(recipe, model, optimizer, train=train, test=test)

    def stepped(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """Pass it on."""
        self.observer.stepped(epoch, step, steps, loss)

    def ended_epoch(self, row: Row, epochs: int) -> None:
        """Measure, and write."""
        standardize, network = self.model.children()
        training = standardize.training
        standardize.eval()
        x: Tensor = standardize(placed(self.samples, Processes(next(network.parameters()).device)))
        standardize.train(training)
        measured = {"drift": None, "gamma": None} if row.diverged else pulse(network, x)
        self.file = self.file.with_row(row, measured, self.versions)
        self.file.write(self.folders.cells)
        self.observer.ended_epoch(row, epochs)
