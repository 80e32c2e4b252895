"""What is to be trained to its end, and in which order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from normprop.lab.names import unknown
from normprop.lab.training.bfloat16 import computes_bfloat16
from normprop.lab.training.recipe import Recipe, clip_at, rate_at

# The rivals of every group; NormProp is trained as `normprop.keep_calibrated` recommends.
NORMS = ("batch", "normprop")
TITLES = {"batch": "BatchNorm", "normprop": "NormProp"}


@dataclass(frozen=True)
class Short:
    """The short runs that choose a rate and a clipping.

    Attributes:
        images: Training images, a fixed random subset.
        validation: Images held out of the training set, by which the choice is made.
        epochs: Passes over them.
    """

    images: int
    validation: int
    epochs: int


@dataclass(frozen=True)
class Group:
    """One network at one batch size, with every normaliser and seed.

    Attributes:
        name: For `--only` and for file names.
        title: For tables.
        base: The recipe of all its cells but normaliser, rate, clipping and seed.
        seeds: Of the cells.
        rates: Highest learning rates to choose from, at batch size 64.
        clips: Clippings to choose from at batch size 64; 0 is none. Both are offered to all normalisers.
        short: How the choice is made.
        epoch_seconds: Rough seconds of an epoch, until one has been measured.
    """

    name: str
    title: str
    base: Recipe
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    clips: tuple[float, ...]
    short: Short
    epoch_seconds: float

    def recipe(self, norm: str, seed: int, lr: float | None = None, clip: float | None = None) -> Recipe:
        """The recipe of a cell, before or after its rate is chosen."""
        kept = norm == "normprop"
        return dataclasses.replace(self.base, norm=norm, seed=seed, lr=lr, clip=clip, keep_calibrated=kept).resolved()

    def candidates(self, norm: str) -> list[Recipe]:
        """The short runs from which a normaliser's rate and clipping are chosen."""
        size, short = self.base.batch_size, self.short
        return [
            dataclasses.replace(
                self.recipe(norm, 0, float(f"{rate_at(size, rate):.6g}"), float(f"{clip_at(size, clip):.6g}")),
                epochs=short.epochs,
                train_images=short.images,
                validation=short.validation,
                halve_every=None,
            ).resolved()
            for rate in self.rates
            for clip in self.clips
        ]


@dataclass(frozen=True)
class Cell:
    """One run to its end."""

    group: Group
    norm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files.

        Example:
            >>> PLANS["full"].cells()[1].name
            'resnet8-128-normprop-s0'
        """
        return f"{self.group.name}-{self.norm}-s{self.seed}"

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.group.title}, {TITLES[self.norm]}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """Groups, and the order in which their cells are trained.

    Attributes:
        groups: All groups.
        stages: Names of groups whose cells take turns, seed by seed, until all are done; then the next ones.
    """

    groups: tuple[Group, ...]
    stages: tuple[tuple[str, ...], ...]

    def group(self, name: str) -> Group:
        """The group of that name.

        Raises:
            NormPropError: for an unknown name, with the nearest ones.
        """
        found = {group.name: group for group in self.groups}
        if name not in found:
            raise unknown("group of runs", name, found)
        return found[name]

    def on(self, device: torch.device) -> Plan:
        """The plan for a device: in float32 where that is faster than bfloat16."""
        if computes_bfloat16(device):
            return self
        plain = [dataclasses.replace(g, base=dataclasses.replace(g.base, dtype="float32")) for g in self.groups]
        return dataclasses.replace(self, groups=tuple(plain))

    def cells(self, only: Sequence[str] = ()) -> list[Cell]:
        """The cells of some groups, or of all, in order.

        Raises:
            NormPropError: for an unknown name.
        """
        chosen = [self.group(name) for name in only] or list(self.groups)
        found = []
        for stage in self.stages:
            groups = [self.group(name) for name in stage]
            seeds = sorted({seed for group in groups for seed in group.seeds})
            found += [
                Cell(group, norm, seed)
                for seed in seeds
                for group in groups
                if group in chosen and seed in group.seeds
                for norm in NORMS
            ]
        return found


_SHORT = Short(images=10_000, validation=5000, epochs=3)
_RATES, _CLIPS = (0.1, 0.2, 0.4, 0.8), (0.0, 0.05)
_MOBILENET = "normprop.lab.networks.mobilenet:mobilenet"
_AUGMENTED = Recipe(data="cifar10", epochs=30, flips=True, crops=4, dtype="bf16", batch_size=128, center="whole")
# The paper's rate halved eight times, its 200 epochs compressed to 40, and its batch size; no augmentation.
_PAPER = Recipe(
    data="cifar10", model="nin", width=0.5, epochs=40, schedule="halving", halve_every=5, dtype="bf16", center="whole"
)


def _group(name: str, title: str, seeds: int, seconds: float, base: Recipe, **changes: Any) -> Group:
    return Group(name, title, dataclasses.replace(base, **changes), tuple(range(seeds)), _RATES, _CLIPS, _SHORT, seconds)


PLANS = {
    "full": Plan(
        groups=(
            _group("resnet8-128", "ResNet-8, batches of 128", 3, 35, _AUGMENTED, model="resnet8"),
            _group("resnet8-8", "ResNet-8, batches of 8", 3, 75, _AUGMENTED, model="resnet8", batch_size=8),
            _group("resnet20-128", "ResNet-20, batches of 128", 2, 100, _AUGMENTED, model="resnet20"),
            _group("nin", "the paper's network ×0.5, batches of 50", 2, 120, _PAPER),
            _group("resnet20-8", "ResNet-20, batches of 8", 2, 150, _AUGMENTED, model="resnet20", batch_size=8),
            _group("mobilenet", "MobileNetV3-like, batches of 128", 2, 100, _AUGMENTED, model=_MOBILENET),
            _group("plain12", "plain, 12 layers ×0.5, batches of 128", 2, 60, _AUGMENTED, model="plain12", width=0.5),
        ),
        stages=(
            ("resnet8-128", "resnet8-8"),
            ("resnet20-128",),
            ("nin",),
            ("resnet20-8",),
            ("mobilenet",),
            ("plain12",),
        ),
    ),
    "smoke": Plan(
        groups=tuple(
            Group(
                name,
                title,
                Recipe(
                    data="digits", model="resnet8", width=0.25, epochs=3, train_images=240, batch_size=size, center="whole"
                ),
                (0, 1),
                (0.1, 0.3),
                (0.0, 0.05),
                Short(images=96, validation=100, epochs=1),
                1,
            )
            for name, title, size in (("digits-16", "digits, batches of 16", 16), ("digits-4", "digits, batches of 4", 4))
        ),
        stages=(("digits-16", "digits-4"),),
    ),
}


def plan(scale: str) -> Plan:
    """The plan of that name.

    Raises:
        NormPropError: for an unknown name.
    """
    if scale not in PLANS:
        raise unknown("scale", scale, PLANS)
    return PLANS[scale]
