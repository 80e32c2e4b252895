"""A run's rows as TensorBoard's event files, beside metrics.jsonl."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from normprop.errors import NormPropError
from normprop.lab.training.history import Row
from normprop.lab.training.observer import Observer

# Of a row, what a curve is drawn of.
_CURVES = ("train_loss", "train_accuracy", "validation_accuracy", "test_accuracy", "lr", "images_per_second")


class EventFile(Observer):
    """Writes every epoch's numbers for `tensorboard --logdir`, by the steps done.

    Args:
        folder: of the event files; one that goes on after an interruption gets another file.

    Raises:
        NormPropError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise NormPropError("TensorBoard is not installed.\nInstall it: pip install tensorboard.") from error
        self.writer: Any = SummaryWriter(str(folder))

    def ended_epoch(self, row: Row, epochs: int) -> None:  # noqa: ARG002  an observer's signature
        """Write its numbers."""
        for name, value in dataclasses.asdict(row).items():
            if name in _CURVES and value is not None:
                self.writer.add_scalar(name, value, row.step)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()
