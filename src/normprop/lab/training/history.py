"""The report of a run: one row per epoch, in memory and as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normprop.lab.training.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One epoch, or its part before the run diverged.

    Attributes:
        epoch: From 1.
        step: Optimiser steps so far.
        lr: Learning rate of the last step.
        train_loss: Cross-entropy in nats, averaged over the epoch's steps, each before its update; None if none was finite.
        train_accuracy: Share of training samples classified correctly, measured in the same way.
        test_accuracy: Share of test samples classified correctly after the epoch; None after divergence and, where there
            are validation samples, before the last epoch.
        validation_accuracy: Share of validation samples classified correctly after the epoch; None without them or after
            divergence.
        seconds: Time spent on the training steps of this epoch, without evaluation and checkpoints.
        images_per_second: Training samples per second, over all processes.
        diverged: Whether the loss became infinite or NaN here.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float | None
    train_accuracy: float | None
    test_accuracy: float | None
    seconds: float
    images_per_second: float
    diverged: bool = False
    validation_accuracy: float | None = None


@dataclass(frozen=True)
class Run:
    """A finished run: its recipe with all defaults, its rows, and the trained network after its `Standardize`."""

    recipe: Recipe
    rows: Sequence[Any]
    model: nn.Module

    @property
    def diverged(self) -> bool:
        """Whether it ended because the loss was no longer finite."""
        return bool(self.rows) and self.rows[-1].diverged

    @property
    def test_accuracy(self) -> float | None:
        """Share of test samples classified correctly at the end; None without an epoch or after divergence."""
        return self.rows[-1].test_accuracy if self.rows else None


def to_json_lines(rows: Sequence[Any]) -> bytes:
    """The rows, dataclasses of plain values, as JSON, one per line.

    Example:
        >>> to_json_lines([Row(1, 10, 0.1, 2.0, 0.5, 0.5, 1.0, 10.0)])[:24]
        b'{"epoch": 1, "step": 10,'
    """
    return "".join(json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n" for row in rows).encode()
