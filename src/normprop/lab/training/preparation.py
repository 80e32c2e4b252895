"""The data and the network of a recipe before the first step."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normprop.conversion.calibration import calibrate
from normprop.conversion.kept_calibration import KeptCalibration, keep_calibrated
from normprop.conversion.stretch import init_beta_
from normprop.data import InputStats, Standardize
from normprop.errors import NormPropError
from normprop.lab.networks.baselines import measure_once
from normprop.lab.networks.memory_format import to_channels_last
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer, realize
from normprop.lab.samples.images import Images
from normprop.lab.samples.seeds import derived
from normprop.lab.training.processes import Processes
from normprop.lab.training.recipe import Recipe

# Number of training samples from which frozen statistics are measured.
_MEASURED = 512
# Number of training samples of each measurement of `keep_calibrated`, its own default.
KEPT = 16


def prepared(images: Images, recipe: Recipe) -> Images:
    """The data set as the recipe divides it: first validation images are held out, then the training subset is taken.

    Raises:
        NormPropError: where there are too few images.
    """
    images = images.hold_out(recipe.validation) if recipe.validation else images
    return images.subset(recipe.train_images) if recipe.train_images else images


def build_model(recipe: Recipe, images: Images, group: Processes) -> nn.Module:
    """A `Standardize` with the statistics of the training set, then the recipe's network, on the group's device."""
    torch.manual_seed(recipe.seed)
    norm = normalizer(recipe.norm)
    network = build(recipe.model, shape=images.shape, classes=images.classes, norm=norm, width=recipe.width)
    stats = InputStats.from_tensor(images.x_train[group.rank :: group.world]).synchronized()
    standardize = Standardize(stats, recipe.data_norm)
    network = realize(network, norm, images.shape)
    if recipe.beta:
        start_beta(network, recipe.beta)
    parts = OrderedDict(standardize=standardize, network=network)
    model = to_channels_last(nn.Sequential(parts).to(group.device))
    if recipe.calibrate:
        samples = some(images, derived(recipe.seed, -1), recipe.calibrate)
        prepare = init_beta_ if recipe.beta is None else calibrate
        prepare(network, standardize(placed(samples, group)), **recipe.covariance())
    measure_once(model, placed(some(images, derived(recipe.seed, -1), _MEASURED), group))
    return model


def kept(recipe: Recipe, model: nn.Module, optimizer: Optimizer, images: Images, group: Processes) -> KeptCalibration | None:
    """`keep_calibrated` where the recipe asks for it, without clipping, which is the recipe's own.

    The samples of a measurement depend on (seed, step) alone, so that a resumed run takes the same.
    """
    if not recipe.keep_calibrated:
        return None
    standardize, network = model.children()

    def samples(step: int) -> Tensor:
        x: Tensor = standardize(placed(some(images, derived(recipe.seed, -2, step), KEPT), group))
        return x

    return keep_calibrated(network, optimizer, samples, clip=0.0, center=recipe.center == "partly")


@torch.no_grad()
def start_beta(network: nn.Module, beta: float) -> None:
    """Set β of every normaliser: the bias of every module whose weight and bias are vectors.

    Raises:
        NormPropError: if there is none.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> start_beta(net, 0.5)
        >>> net[1].bias.tolist(), bool((net[0].bias == 0.5).any())
        ([0.5, 0.5, 0.5], False)
    """
    normalizers = [
        module
        for module in network.modules()
        if all(isinstance(p := getattr(module, name, None), nn.Parameter) and p.dim() == 1 for name in ("weight", "bias"))
    ]
    if not normalizers:
        raise NormPropError("The network has no normaliser with a β.\nLeave out --beta.")
    for module in normalizers:
        module.get_parameter("bias").fill_(beta)


def placed(x: Tensor, group: Processes) -> Tensor:
    """Samples on the device, contiguous: the memory format of activations is for the network to choose."""
    return x.to(group.device).contiguous()


def some(images: Images, seed: int, count: int) -> Tensor:
    """`count` random training samples, or all if there are fewer."""
    chosen = torch.randperm(len(images.x_train), generator=torch.Generator().manual_seed(seed))
    return images.x_train[chosen[:count]]
