"""A watcher that measures hidden layers while a run trains."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normprop.inspection.hidden_layers import hidden_layers
from normprop.lab.samples.images import Images
from normprop.lab.training.history import Row
from normprop.lab.training.observer import Watcher
from normprop.lab.training.preparation import prepared
from normprop.lab.training.recipe import Recipe


@dataclass(frozen=True)
class ProbeSome:
    """A choice of the runs to watch; it can be sent to other processes.

    Attributes:
        recipes: The recipes of the runs.
        samples: Number of validation images to measure on.
    """

    recipes: frozenset[Recipe]
    samples: int

    def __call__(self, recipe: Recipe, images: Images) -> Watcher:
        """The watcher of a run."""
        if recipe not in self.recipes:
            return Watcher()
        held_out = prepared(images, recipe).x_validation
        assert held_out is not None
        return ProbeWatcher(held_out[: self.samples])


class ProbeWatcher(Watcher):
    """Probes the network before the first epoch and after each.

    Args:
        samples: Images in their own units.
    """

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples
        self.model: nn.Module = nn.Identity()
        self.found: list[dict[str, Any]] = []

    def started(self, recipe: Recipe, model: nn.Module, optimizer: Optimizer, *, train: int, test: int) -> None:
        """Note the network as it is initialised."""
        self.model = model
        self._note(0)

    def ended_epoch(self, row: Row, epochs: int) -> None:
        """Note the network after an epoch."""
        if not row.diverged:
            self._note(row.epoch)

    def findings(self) -> tuple[Any, ...]:
        """One entry per measurement: the epoch and the layers."""
        return tuple(self.found)

    def _note(self, epoch: int) -> None:
        device = next(self.model.parameters()).device
        standardize = self.model.get_submodule("standardize")
        training = standardize.training
        standardize.eval()
        with torch.no_grad():
            x = standardize(self.samples.to(device))
        standardize.train(training)
        layers = hidden_layers(self.model.get_submodule("network"), x)
        self.found.append({"epoch": epoch, "layers": [_finite(dataclasses.asdict(layer)) for layer in layers]})


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values with None for numbers that JSON lacks."""
    plain = {key: _finite(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
