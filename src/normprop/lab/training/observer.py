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


class Observers(Observer):
    """Several observers.

    Args:
        observers: are told in this order.
    """

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def started(self, recipe: Recipe, model: nn.Module, optimizer: Optimizer, *, train: int, test: int) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.started(recipe, model, optimizer, train=train, test=test)

    def stepped(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.stepped(epoch, step, steps, loss)

    def ended_epoch(self, row: Row, epochs: int) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.ended_epoch(row, epochs)


class Watcher(Observer):
    """An observer whose findings are kept with the run; this one notes nothing."""

    def findings(self) -> tuple[Any, ...]:
        """Plain values for JSON."""
        return ()
