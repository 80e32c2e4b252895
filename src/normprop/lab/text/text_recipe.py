"""All that determines what a character model learns."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from normprop.errors import NormPropError
from normprop.lab.names import unknown
from normprop.lab.text.character_model import recurrent_norm
from normprop.lab.training.schedules import Schedule

MODELS = ("charlstm",)


@dataclass(frozen=True)
class TextRecipe:
    """One training run of a character model: equal recipes on equal machines give equal weights.

    Example:
        >>> TextRecipe(norm="layer").resolved().gain
        1.0
    """

    data: str = "shakespeare"
    """shakespeare, or FILE.txt in UTF-8."""
    model: str = "charlstm"
    """charlstm: a fixed orthogonal embedding, LSTMs, a linear layer."""
    norm: str = "normprop"
    """normprop, normprop-follow (whose variances follow gains and biases), layer, weight or none."""
    hidden: int = 256
    """Features of the state of each LSTM."""
    layers: int = 1
    """How many LSTMs are stacked."""
    updates: int = 2000
    """Steps of the optimizer."""
    batch_size: int = 32
    """Streams into which the text is cut, read side by side."""
    window: int = 100
    """Characters of each stream per step; the state is kept from one step to the next, gradients aren't."""
    held_out: float = 0.05
    """Share of the text for the test, at its end; validation takes as much before that."""
    lr: float | None = None
    """Highest learning rate of Adam; by default one that suits the normaliser."""
    schedule: Schedule = "onecycle"
    """How the learning rate changes."""
    clip: float = 1.0
    """Longest gradient of all weights together; longer ones are shortened to it. 0 for no limit."""
    gain: float | None = None
    """What the gains of the gates start at; by default 1; weight and none have no gains."""
    forget_bias: float = 0.0
    """What the bias of the forget gates starts at."""
    seed: int = 0
    """Seed of the initialisation."""

    def resolved(self) -> TextRecipe:
        """The same recipe with its dependent defaults filled in, checked.

        Raises:
            NormPropError: for numbers out of range and unknown names.
        """
        if self.model not in MODELS:
            raise unknown("model of text", self.model, MODELS)
        norm = recurrent_norm(self.norm)
        least = {"hidden": 1, "layers": 1, "updates": 0, "batch_size": 1, "window": 1, "clip": 0.0}
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise NormPropError(f"{_flag(name)} is {getattr(self, name)}.\nUse {value} or more.")
        for name in ("lr", "gain"):
            found = getattr(self, name)
            if found is not None and not 0 < found < math.inf:
                raise NormPropError(f"{_flag(name)} is {found}.\nUse a number above 0.")
        if not math.isfinite(self.forget_bias):
            raise NormPropError(f"--forget-bias is {self.forget_bias}.\nUse a finite number, such as 0 or 1.")
        if self.gain is not None and norm.gain is None:
            raise NormPropError(f"--norm {self.norm} has no gains.\nLeave out --gain, or use --norm normprop or layer.")
        return dataclasses.replace(
            self,
            lr=norm.rate if self.lr is None else self.lr,
            gain=norm.gain if self.gain is None else self.gain,
        )

    def changes_from(self, earlier: dict[str, Any]) -> list[str]:
        """The changes that keep a run with the `earlier` recipe from being continued with this one: `--field old → new`."""
        return [
            f"{_flag(name)} {earlier.get(name)} → {value}"
            for name, value in dataclasses.asdict(self).items()
            if earlier.get(name) != value
        ]


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
