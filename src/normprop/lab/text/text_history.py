"""The report of a run on text: one row at every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from normprop.lab.text.character_model import CharacterLSTM
from normprop.lab.text.text_recipe import TextRecipe


@dataclass(frozen=True)
class TextRow:
    """What a model has learnt after some updates.

    Attributes:
        update: Steps of the optimizer so far.
        lr: Learning rate of the last step.
        train_bits: Cross-entropy in bits per character, averaged over the steps since the last row, each before its update;
            None if none was finite.
        validation_bits: Bits per character of the validation part, or of its first 100,000 characters; None after
            divergence.
        test_bits: Bits per character of the held-out end of the text; None before the last update and after divergence.
        seconds: Time spent on all training steps so far, without evaluation and checkpoints.
        characters_per_second: Of the training steps since the last row.
        diverged: Whether the loss became infinite or NaN here.
    """

    update: int
    lr: float
    train_bits: float | None
    validation_bits: float | None
    test_bits: float | None
    seconds: float
    characters_per_second: float
    diverged: bool = False


@dataclass(frozen=True)
class TextRun:
    """A finished run: its recipe with all defaults, its rows, the trained model, and some text that it wrote."""

    recipe: TextRecipe
    rows: Sequence[TextRow]
    model: CharacterLSTM
    sample: str

    @property
    def diverged(self) -> bool:
        """Whether it ended because the loss was no longer finite."""
        return bool(self.rows) and self.rows[-1].diverged

    @property
    def test_bits(self) -> float | None:
        """Bits per character of the held-out text at the end; None after divergence."""
        return self.rows[-1].test_bits if self.rows else None


Report = Callable[[TextRow], None]
