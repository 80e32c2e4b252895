"""All that determines what a run learns, with defaults that depend on each other."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from normprop.errors import NormPropError
from normprop.lab.networks.normalizers import Normalizer, normalizer
from normprop.lab.samples.images import Images
from normprop.lab.training.schedules import Schedule

_LEAST = (
    ("batch_size", 1),
    ("epochs", 0),
    ("validation", 0),
    ("crops", 0),
    ("momentum", 0.0),
    ("weight_decay", 0.0),
    ("calibrate", 0),
    ("directions", 0),
    ("recalibrate", 0),
    ("shrinkage", 0.0),
)
OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]
# Rates as multiples of SGD's.
RATES: dict[OptimizerName, float] = {"sgd": 1.0, "adam": 0.03, "adamw": 0.03, "rmsprop": 0.01}
# What recipes had before they said so.
ADDED: dict[str, Any] = {"optimizer": "sgd", "keep_calibrated": False, "center": "whole"}
# The rate at batch size 64 above which clipping gets tighter, so that steps don't get longer.
CLIP_UP_TO = 0.1
# Defaults of calibration: principal directions of inputs, their shrinkage where clipping restrains the gradients already,
# and samples between two calibrations.
_DIRECTIONS = 8
_SHRINKAGE = 0.9
_RECALIBRATE = 6400


class _Covariance(TypedDict):
    directions: int
    shrinkage: float


@dataclass(frozen=True)
class Setting:
    """The settings that all runs of a comparison share: data, network and training, except for what is compared."""

    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, svhn, FILE.npz, or a folder of images."""
    model: str = "nin"
    """nin, mlp, plain12 (any plainN), resnet8 … resnet110, resnet18, torchvision:NAME, timm:NAME, or MODULE:FUNCTION;
    for text charlstm, whose options `normprop train --model charlstm --help` lists."""
    width: float = 1.0
    """Factor on the number of channels of the built-in networks."""
    epochs: int = 10
    """Passes over the training set."""
    train_images: int | None = None
    """Size of a fixed random subset of the training set to use instead of all of it."""
    validation: int | None = None
    """Number of training images to hold out for the choice of settings, the same in every run. Test accuracy is then
    measured after the last epoch only. By default 0, and a tenth of the training set where settings are compared."""
    image_size: int | None = None
    """Height and width to which the images of a folder are resized."""
    schedule: Schedule = "onecycle"
    """How the learning rate changes; halving is the paper's schedule."""
    halve_every: int | None = None
    """Epochs between two halvings; by default an eighth of the run, as in the paper."""
    optimizer: OptimizerName = "sgd"
    """sgd (with momentum), adam, adamw or rmsprop."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of weights; gains and biases have none."""
    flips: bool = False
    """Mirror training images at random."""
    crops: int = 0
    """Shift training images at random by up to this many pixels."""
    data_norm: Literal["global", "batch"] = "global"
    """Standardise the input by the statistics of the training set or of the mini-batch."""
    dtype: Literal["float32", "bf16"] = "float32"
    """bf16 computes under autocast; weights stay float32."""


@dataclass(frozen=True)
class Recipe(Setting):
    """One training run: equal recipes on equal machines give equal weights.

    Example:
        >>> Recipe(norm="batch", batch_size=64).resolved().lr
        0.1
    """

    norm: str = "normprop"
    """normprop, paper, batch, frozen, group, layer, instance, ws, frn, evonorm-s0, nf, weight, none or none-zero."""
    batch_size: int = 50
    """Samples per step, over all processes together."""
    lr: float | None = None
    """Highest learning rate; by default one that suits normaliser and optimizer at batch size 64, times
    (batch size / 64)^¾."""
    clip: float | None = None
    """Adaptive gradient clipping at this ratio of gradient to weight, 0 for none; by default 0.05·√(64 / batch size)
    for normprop, paper and nf, none for the others. Above a rate of 0.1·(batch size / 64)^¾ the ratio falls as 1/rate."""
    keep_calibrated: bool | None = None
    """Let `normprop.keep_calibrated` start β, calibrate, and calibrate again, as it does in a loop of one's own; gradients
    are clipped as --clip says. By default so for normprop, unless one of --calibrate, --directions, --shrinkage,
    --recalibrate and --beta is given."""
    center: Literal["partly", "whole"] | None = None
    """Whether filters of a network that is kept calibrated lose all but 1/√n of their mean, as they do by default, or all of
    it; without --keep-calibrated it is all."""
    calibrate: int | None = None
    """Number of training samples from which normprop's constants are set before the first step; 0 keeps those that are
    computed for independent inputs. By default 256 where calibration isn't kept; other normalisers have no constants."""
    directions: int | None = None
    """Number of principal directions of every layer's input that calibration measures; by default 8."""
    shrinkage: float | None = None
    """Shrink their covariance towards independence: 0 counts it whole, 1 not at all. By default 0.9 where gradients are
    clipped, 0 where only directions restrain them."""
    recalibrate: int | None = None
    """Number of samples between two calibrations, which keep the function; 0 for none after the first. By default 6400."""
    beta: float | None = None
    """Initial β of every normaliser; above 0 a ReLU cuts off less. By default 0, and for a calibrated normprop the first of
    0, ½ and 1 with which the network doesn't stretch small differences too much."""
    seed: int = 0
    """Seed of initialisation, order, augmentation, dropout and the samples for calibration."""

    def resolved(self) -> Recipe:
        """The same recipe with its dependent defaults filled in, checked.

        Raises:
            NormPropError: for numbers out of range and combinations that can't train.
        """
        norm = normalizer(self.norm)
        for name, least in _LEAST:
            if (getattr(self, name) or 0) < least:
                raise NormPropError(f"{_flag(name)} is {getattr(self, name)}.\nUse {least} or more.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise NormPropError(f"--lr is {self.lr}.\nUse a rate above 0.")
        if self.batch_size < norm.smallest_batch:
            raise NormPropError(
                f"--norm {self.norm} can't train at batch size {self.batch_size}: a batch of one has no statistics.\n"
                f"Use --batch-size {norm.smallest_batch} or more, or --norm normprop, which works at any batch size."
            )
        if self.calibrate and norm.method != "exact":
            raise NormPropError(
                f"--norm {self.norm} has nothing to calibrate.\nLeave out --calibrate, or use --norm normprop."
            )
        keeps = self._keeps_calibrated(norm)
        if keeps and (norm.method != "exact" or self.calibrate or self.beta is not None):
            raise NormPropError(
                "--keep-calibrated is for --norm normprop, and sees to calibration and β itself.\n"
                "Leave out --calibrate and --beta, or --keep-calibrated."
            )
        if self.center == "partly" and not keeps:
            raise NormPropError("--center partly is for --keep-calibrated, which sees to it.\nLeave out one or the other.")
        calibrate = norm.calibrate if self.calibrate is None else self.calibrate
        calibrate = 0 if keeps else calibrate
        for name in ("directions", "shrinkage", "recalibrate"):
            if getattr(self, name) and not calibrate:
                raise NormPropError(f"{_flag(name)} needs calibration.\nUse --calibrate 256, or leave it out.")
        if (self.shrinkage or 0.0) > 1:
            raise NormPropError(f"--shrinkage is {self.shrinkage}.\nUse 1 or less.")
        if self.beta is not None and not math.isfinite(self.beta):
            raise NormPropError(f"--beta is {self.beta}.\nUse a finite number.")
        if self.data_norm == "batch" and self.batch_size == 1:
            raise NormPropError("--data-norm batch can't train at batch size 1.\nUse --data-norm global.")
        clip = clip_at(self.batch_size, norm.clip) if self.clip is None else self.clip
        shrinkage = _SHRINKAGE if clip else 0.0
        return dataclasses.replace(
            self,
            lr=rate_at(self.batch_size, norm.rate * RATES[self.optimizer]) if self.lr is None else self.lr,
            clip=clip,
            keep_calibrated=keeps,
            center=self.center or ("partly" if keeps else "whole"),
            calibrate=calibrate,
            directions=_DIRECTIONS if calibrate and self.directions is None else self.directions,
            shrinkage=shrinkage if calibrate and self.shrinkage is None else self.shrinkage,
            recalibrate=_RECALIBRATE if calibrate and self.recalibrate is None else self.recalibrate,
            beta=0.0 if self.beta is None and not (calibrate or keeps) else self.beta,
            validation=self.validation or 0,
            halve_every=self.halve_every or max(1, self.epochs // 8),
        )

    def _keeps_calibrated(self, norm: Normalizer) -> bool:
        if self.keep_calibrated is not None:
            return self.keep_calibrated
        own = (self.calibrate, self.directions, self.shrinkage, self.recalibrate, self.beta)
        return norm.calibrate > 0 and all(value is None for value in own)

    def covariance(self) -> _Covariance:
        """The arguments with which `normprop.calibrate` is to measure the covariance of inputs."""
        return {"directions": self.directions or 0, "shrinkage": self.shrinkage or 0.0}

    def check_fits(self, images: Images, *, world: int = 1) -> None:
        """Raise if this recipe can't be followed with such data or so many processes.

        Raises:
            NormPropError: for batches larger than the data or not divisible by `world`; flips or crops of vectors.
        """
        if self.batch_size > len(images.x_train):
            raise NormPropError(
                f"--batch-size {self.batch_size} is more than the {len(images.x_train)} training images.\nUse a smaller one."
            )
        if self.batch_size % world:
            raise NormPropError(
                f"{world} processes can't share batches of {self.batch_size} evenly.\n"
                f"Use a --batch-size divisible by {world}."
            )
        if (self.flips or self.crops) and len(images.shape) != 3:
            raise NormPropError(f"--flips and --crops need images, not samples of shape {images.shape}.\nLeave them out.")

    def changes_from(self, earlier: dict[str, Any]) -> list[str]:
        """The changes that keep a run with the `earlier` recipe from being continued with this one, as `--field old → new`.

        More epochs are no obstacle under a schedule that doesn't depend on the end.
        """
        earlier = ADDED | earlier
        open_ended = self.schedule in ("constant", "halving")
        return [
            f"{_flag(name)} {earlier.get(name)} → {value}"
            for name, value in dataclasses.asdict(self).items()
            if earlier.get(name) != value and not (name == "epochs" and open_ended and value > earlier.get(name, 0))
        ]


def rate_at(batch_size: int, rate: float) -> float:
    """The learning rate that corresponds to `rate` at batch size 64.

    Between the √ of independent noise and the proportionality of a noiseless gradient; on Fashion-MNIST at batch size 1
    with a narrow `nin` it beat √ for both forms of NormProp.

    Example:
        >>> round(rate_at(4, 0.1), 4)
        0.0125
    """
    return rate * math.pow(batch_size / 64, 0.75)


def clip_at(batch_size: int, clip: float) -> float:
    """The adaptive clipping that corresponds to `clip` at batch size 64: the noise in a gradient falls as 1/√batch.

    Example:
        >>> clip_at(4, 0.05)
        0.2
    """
    return clip / math.sqrt(batch_size / 64)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
