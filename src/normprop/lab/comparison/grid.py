"""A grid of runs: every normaliser at every batch size, learning rate and clipping, with every seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from normprop.errors import NormPropError
from normprop.lab.networks.normalizers import normalizer
from normprop.lab.samples.images import Images
from normprop.lab.training.recipe import Recipe, Setting, clip_at, rate_at

# Share of the training set that is held out by default.
_VALIDATION = 0.1


@dataclass(frozen=True)
class Grid(Setting):
    """What is compared in one setting, at the same rates and clippings for all normalisers.

    Example:
        >>> grid = Grid(norms=("batch", "normprop"), batch_sizes=(2, 1), rates=(0.1,), clips=(0.0,), validation=100)
        >>> [(recipe.norm, recipe.batch_size) for recipe in grid.recipes()]
        [('batch', 2), ('normprop', 2), ('normprop', 1)]
    """

    norms: tuple[str, ...] = ("normprop", "batch", "group", "none")
    """Normalisers, as in normprop train --norm."""
    batch_sizes: tuple[int, ...] = (64,)
    """Samples in a step. A normaliser that can't train at one is left out there."""
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Highest learning rates at batch size 64; at another they are multiplied by (batch size / 64)^¾."""
    clips: tuple[float, ...] = (0.0, 0.05)
    """Adaptive gradient clippings at batch size 64, 0 for none; at another they are divided by √(batch size / 64)."""
    keep_calibrated: bool = True
    """Let `normprop.keep_calibrated` see to calibration, as in a loop of one's own; without it normprop is calibrated on 256
    samples, after every 6,400 again, and its filters are centred whole."""
    seeds: int = 1
    """Number of runs of each, with seeds from 0."""
    finalists: int | None = None
    """Per normaliser and batch size, run seeds after the first only at this number of pairs of rate and clipping: those that
    did best with the first seed. By default at all."""
    contenders: int | None = None
    """With finalists: only of this number of normalisers per batch size, those that did best. By default of all."""

    def fitted(self, images: Images) -> Grid:
        """The same grid with its number of validation images, for a data set.

        Raises:
            NormPropError: without validation images.
        """
        validation = round(_VALIDATION * len(images.x_train)) if self.validation is None else self.validation
        if validation < 1:
            raise NormPropError("Settings can't be compared without --validation images.\nHold out a tenth or so.")
        return dataclasses.replace(self, validation=validation)

    def rounds(self) -> list[Grid]:
        """The grid; with finalists its first seed, then all of it, which `promoted` shortens."""
        if self.finalists is None or self.seeds < 2:
            return [self]
        return [dataclasses.replace(self, seeds=1), self]

    def recipes(self) -> list[Recipe]:
        """The runs with all defaults filled in, one seed after the other: the first ones show most.

        Raises:
            NormPropError: for an axis without values, or values out of range.
        """
        for axis in ("norms", "batch_sizes", "rates", "clips"):
            if not getattr(self, axis):
                raise NormPropError(f"--{axis.replace('_', '-')} names nothing to compare.\nGive one value or more.")
        if self.finalists is not None and self.finalists < 1:
            raise NormPropError(f"--finalists is {self.finalists}.\nUse 1 or more, or leave it out.")
        if self.contenders is not None and (self.contenders < 1 or self.finalists is None):
            raise NormPropError(
                f"--contenders {self.contenders} goes with --finalists.\nUse 1 or more of each, or leave it out."
            )
        if min(self.seeds, self.epochs) < 1 or min(self.clips) < 0:
            raise NormPropError("--seeds or --epochs is below 1, or one of --clips below 0.\nUse 1 or more; 0 doesn't clip.")
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Setting)}
        shared["keep_calibrated"] = None if self.keep_calibrated else False
        runs = [
            Recipe(**shared, norm=norm, batch_size=size, lr=rate_at(size, rate), clip=clip_at(size, clip), seed=seed)
            for seed in range(self.seeds)
            for size in self.batch_sizes
            for clip in self.clips
            for rate in self.rates
            for norm in self.norms
            if size >= normalizer(norm).smallest_batch
        ]
        return list(dict.fromkeys(run.resolved() for run in runs))

    def left_out(self) -> list[tuple[str, int]]:
        """Pairs of normaliser and batch size that can't train."""
        return [(norm, size) for norm in self.norms for size in self.batch_sizes if size < normalizer(norm).smallest_batch]


def setting_of(recipe: Recipe) -> Setting:
    """What a run has in common with those it can be compared with."""
    return Setting(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(Setting)})


def check_comparable(recipes: Collection[Recipe]) -> None:
    """Raise where runs differ in more than a grid's axes.

    Raises:
        NormPropError: naming what differs.
    """
    settings = [dataclasses.asdict(setting_of(recipe)) for recipe in recipes]
    for name in settings[0] if settings else ():
        values = list(dict.fromkeys(setting[name] for setting in settings))
        if len(values) > 1:
            raise NormPropError(
                f"Runs with --{name.replace('_', '-')} {values[0]} and {values[1]} can't be compared.\n"
                "Use another --out for another setting."
            )
