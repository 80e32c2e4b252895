"""The scale of a reproduction: the paper's own, a quarter of the width for two cores, or enough to see it work."""

from __future__ import annotations

from dataclasses import dataclass

from normprop.errors import NormPropError


@dataclass(frozen=True)
class Schedule:
    """The number of epochs of a run, and between two halvings of the rate."""

    epochs: int
    halve_every: int


@dataclass(frozen=True)
class Scale:
    """Settings that depend on the time at hand.

    Attributes:
        name: Its name for `--scale`.
        data: Data sets of table 1; all other experiments use the first.
        width: Factor on the channels of the paper's network.
        train_images: Number of training images after the validation split; None for all.
        validation: Number of images held out of the training set.
        usual: The schedule of all runs except those of the next three.
        data_norm: The schedule of figure 1.
        single: The schedule of batch size 1.
        svhn: The schedule of SVHN.
        seeds: Number of runs per setting in figures 3 and 4 and table 1; the other experiments have one.
        probed: Number of validation images on which hidden layers are measured.
        speed_seconds: Seconds for which steps are timed.
    """

    name: str
    data: tuple[str, ...]
    width: float
    train_images: int | None
    validation: int
    usual: Schedule
    data_norm: Schedule
    single: Schedule
    svhn: Schedule
    seeds: int
    probed: int
    speed_seconds: float

    def with_seeds(self, seeds: int | None) -> int:
        """The number of seeds asked for, by default this scale's own.

        Raises:
            NormPropError: below 1.
        """
        if seeds is not None and seeds < 1:
            raise NormPropError(f"--seeds is {seeds}.\nUse 1 or more.")
        return seeds or self.seeds


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="smoke",
            data=("digits",),
            width=0.05,
            train_images=500,
            validation=100,
            usual=Schedule(3, 1),
            data_norm=Schedule(1, 1),
            single=Schedule(1, 1),
            svhn=Schedule(2, 1),
            seeds=1,
            probed=50,
            speed_seconds=0.5,
        ),
        # The paper's 200 epochs, halved every 25, become eight halved every one; batch size 1, where an epoch takes ten
        # times as long, gets two of them.
        Scale(
            name="quarter",
            data=("cifar10",),
            width=0.25,
            train_images=10_000,
            validation=2000,
            usual=Schedule(8, 1),
            data_norm=Schedule(8, 1),
            single=Schedule(2, 1),
            svhn=Schedule(10, 2),
            seeds=3,
            probed=500,
            speed_seconds=60.0,
        ),
        Scale(
            name="full",
            data=("cifar10", "cifar100", "svhn"),
            width=1.0,
            train_images=None,
            validation=5000,
            usual=Schedule(200, 25),
            data_norm=Schedule(80, 10),
            single=Schedule(200, 25),
            svhn=Schedule(25, 5),
            seeds=3,
            probed=500,
            speed_seconds=60.0,
        ),
    )
}
