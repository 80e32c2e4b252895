"""Observers of a run."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from normprop.lab.training.history import Row
from normprop.lab.training.recipe import Recipe


class Observer:
    """An observer is told how a run goes; this one ignores it."""

    def started(self, recipe: Recipe, model: nn.Module, optimizer: Optimizer, *, train: int, test: int) -> None:
        """Training is about to begin, on `train` samples; `test` samples are evaluated."""

    def stepped(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """`step` of the epoch's `steps` are done; `loss` is that of the last one."""

    def ended_epoch(self, row: Row, epochs: int) -> None:
        """An epoch is done, one of `epochs`."""


class Watcher(Observer):
    """An observer whose findings are kept with the run; this one notes nothing."""

    def findings(self) -> tuple[Any, ...]:
        """Plain values for JSON."""
        return ()
