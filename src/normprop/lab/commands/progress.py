"""The progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import Optimizer

from normprop.lab.commands.console import percent
from normprop.lab.training.bfloat16 import computes_bfloat16
from normprop.lab.training.history import Row
from normprop.lab.training.observer import Observer
from normprop.lab.training.recipe import Recipe

# A log that is silent for longer looks like a run that hangs.
_LINE_EVERY_SECONDS = 60.0


class RunDisplay(Observer):
    """Prints a run's settings, its epochs and, on a terminal, a bar of its steps, with the time that is left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.printed = time.monotonic()
        self.epochs = 0

    def started(self, recipe: Recipe, model: nn.Module, optimizer: Optimizer, *, train: int, test: int) -> None:
        """Print what is about to be trained."""
        self.epochs = recipe.epochs
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        clip = f", clipping at {recipe.clip:g}" if recipe.clip else ""
        self._line(
            f"{recipe.model} ×{recipe.width:g} with --norm {recipe.norm} on {recipe.data}: {parameters:,} parameters, "
            f"{train:,} training and {test:,} test samples; batch size {recipe.batch_size}, {recipe.optimizer}, rate "
            f"{recipe.lr:.3g} {recipe.schedule}{clip}, seed {recipe.seed}"
        )
        if recipe.dtype == "bf16" and not computes_bfloat16(next(model.parameters()).device):
            self._line("this processor has no bfloat16 and converts every number: --dtype float32 is many times faster")
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=None)
            self.bar.start()

    def stepped(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """Move the bar, or print a line now and then."""
        if self.bar:
            done, total = (epoch - 1) * steps + step, self.epochs * steps
            self._move(done, total, f"epoch {epoch}/{self.epochs}  loss {loss:.3f}")
        elif time.monotonic() - self.printed > _LINE_EVERY_SECONDS:
            self._line(f"epoch {epoch}  step {step}/{steps}  loss {loss:.3f}")

    def ended_epoch(self, row: Row, epochs: int) -> None:
        """Print the epoch."""
        if row.diverged:
            self._line(f"epoch {row.epoch:>3}/{epochs}  the loss is no longer finite at step {row.step}")
        else:
            self._line(
                f"epoch {row.epoch:>3}/{epochs}  loss {row.train_loss:.4f}  train {percent(row.train_accuracy)}  "
                f"{_held_out(row)}  rate {row.lr:.2g}  {row.seconds:.1f} s  "
                f"{row.images_per_second:,.0f} images/s"
            )

    def close(self) -> None:
        """Remove the bar."""
        if self.bar:
            self.bar.stop()

    def _move(self, done: int, total: int, description: str) -> None:
        """Steps of the whole run: the time that is left is its own, and doesn't count steps before an interruption."""
        assert self.bar is not None
        if self.bar.tasks[0].total is None:
            self.bar.reset(self.task, total=total, completed=done, description=description)
        else:
            self.bar.update(self.task, completed=done, description=description)

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)
        self.printed = time.monotonic()


def _held_out(row: Row) -> str:
    """Accuracies on validation and test samples, as far as they were measured."""
    accuracies = (("validation", row.validation_accuracy), ("test", row.test_accuracy))
    return "  ".join(f"{name} {percent(value)}" for name, value in accuracies if value is not None)
