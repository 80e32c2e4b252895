"""What the ablations do to a network before its first step, beyond what a recipe can say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from group_noise import GroupNoise
from torch import Tensor, nn
from torch.optim import Optimizer

import normprop
from normprop.channel_moments import Moments
from normprop.conversion.lane_writer import upstream
from normprop.graph.node import Node
from normprop.lab.networks.resnet import Block
from normprop.lab.samples.images import Images
from normprop.lab.samples.seeds import derived
from normprop.lab.training.observer import Watcher
from normprop.lab.training.preparation import prepared, some
from normprop.lab.training.recipe import Recipe
from normprop.optim import UnitNormProjection
from normprop.sites.site import Site, site_moments

# Changes a network, or the optimizer that is to train it.
Treatment = Callable[[nn.Module, Optimizer], None]


@dataclass(frozen=True)
class Treated:
    """Treats the network of a run when it starts, and calibrates it again; it can be sent to other processes.

    Attributes:
        treat: What is done.
    """

    treat: Treatment

    def __call__(self, recipe: Recipe, images: Images) -> Watcher:
        """Who does it."""
        return _Treating(self.treat, prepared(images, recipe))


class _Treating(Watcher):
    def __init__(self, treat: Treatment, images: Images) -> None:
        self.treat, self.images = treat, images

    def started(self, recipe: Recipe, model: nn.Module, optimizer: Optimizer, *, train: int, test: int) -> None:
        standardize, network = model.children()
        treat = self.treat
        if isinstance(treat, GroupNoise):
            draw = lambda seed, count: standardize(some(self.images, derived(recipe.seed, -3, seed), count))
            treat = replace(treat, draw=draw)
        treat(network, optimizer)
        if recipe.calibrate:
            samples = standardize(some(self.images, derived(recipe.seed, -1), recipe.calibrate))
            normprop.calibrate(network, samples, **recipe.covariance())


def untreated(network: nn.Module, optimizer: Optimizer) -> None:
    """Leave it as it is."""


@dataclass(frozen=True)
class Uncentred:
    """Filters of some layers keep their mean.

    Attributes:
        layers: Paths of the layers, or None for all.
    """

    layers: Sequence[str] | None = None

    def __call__(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Say so to the sites."""
        for entry in normprop.lane(network).all_entries():
            if entry.layer is not None and (self.layers is None or entry.layer in self.layers):
                site = network.get_submodule(entry.site)
                assert isinstance(site, Site)
                site.center = False
                site.record.data[0] = 0


@dataclass(frozen=True)
class BranchGain:
    """The last γ of every residual branch starts at another value than 1; 0 is what Goyal et al. (2017) do.

    Attributes:
        gain: That value; None for 1/√B in a network of B blocks.
    """

    gain: float | None = None

    @torch.no_grad()
    def __call__(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Set them."""
        ends = [module.get_submodule("norm2") for module in network.modules() if _is_block(module)]
        for end in ends:
            end.get_parameter("weight").fill_(1 / math.sqrt(len(ends)) if self.gain is None else self.gain)


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


def projected(network: nn.Module, optimizer: Optimizer) -> None:
    """Filters are kept at unit length, and momenta tangent."""
    UnitNormProjection(optimizer, network)


def learned_proxies(network: nn.Module, optimizer: Optimizer) -> None:
    """Later layers take a site's output for N(β + β̃, γ²(1 + γ̃)²) with learned β̃ and γ̃ (Labatie et al. 2021)."""
    lane = normprop.lane(network)
    proxies: dict[str, nn.ParameterDict] = {}
    nodes = {node for entry in lane.all_entries() for node in upstream(entry.scale) if node.target is site_moments}
    for node in nodes:
        (site, rank, channel), *_ = node.args
        name = f"proxy_{site.target.replace('.', '_')}"
        if name not in proxies:
            like = network.get_submodule(site.target).get_parameter("weight")
            proxies[name] = nn.ParameterDict({n: nn.Parameter(torch.zeros_like(like)) for n in ("weight", "bias")})
            network.add_module(name, proxies[name])
        proxy = Node("module", name, (nn.ParameterDict,))
        node.target, node.args = proxied_moments, (site, proxy, rank, channel)
    lane.programs.clear()
    parameters = [parameter for proxy in proxies.values() for parameter in proxy.parameters()]
    optimizer.param_groups[-1]["params"] += parameters  # the group without weight decay; the schedule knows it already


def proxied_moments(site: Site, proxy: nn.ParameterDict, rank: int, channel: int) -> Moments:
    """`site_moments` with γ (1 + γ̃) and β + β̃."""
    assert site.weight is not None
    assert site.bias is not None
    shape = [len(site.weight) if d == channel % rank else 1 for d in range(rank)]
    gamma, beta = site.weight * (1 + proxy["weight"]), site.bias + proxy["bias"]
    return Moments(beta.reshape(shape), gamma.square().reshape(shape))


@dataclass(frozen=True)
class BatchNoise:
    """In training the statistics of every site are off as much as those of a batch of independent values would be.

    d moves by N(0, 1/n) √k, and k is multiplied with χ²(n−1)/(n−1), per channel and step; evaluation has neither.

    Attributes:
        size: n, the number of independent values.
    """

    size: int

    def __call__(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Draw before every forward of training, and take it back behind the step: backward needs what forward saw."""
        sites, clean = _sites(network), list[tuple[Tensor, Tensor]]()

        def disturb(module: nn.Module, _inputs: object) -> None:
            restore()
            if module.training:
                clean[:] = [(site.shift.detach().clone(), site.scale.detach().clone()) for site in sites]
                for site in sites:
                    self.disturb(site)

        def restore(*_: object) -> None:
            for site, (shift, scale) in zip(sites, clean, strict=False):
                site.shift.data.copy_(shift)
                site.scale.data.copy_(scale)
            clean.clear()

        network.register_forward_pre_hook(disturb, prepend=True)
        optimizer.register_step_post_hook(restore)

    def disturb(self, site: Site) -> None:
        """Once."""
        shift, scale = site.shift.data, site.scale.data
        shift.add_(torch.randn_like(shift) * (scale / self.size).sqrt())
        freedom = self.size - 1
        scale.mul_(torch.distributions.Chi2(torch.full_like(scale, float(freedom))).sample() / freedom)


@dataclass(frozen=True)
class GainDecay:
    """γ decays as if there were batches: λ γ²/2 is added to the loss, with λ = 1/(2n) for batches of n.

    Of Luo et al. (2019, arXiv 1809.00846): batch statistics act on average as population statistics and a penalty
    ζ γ². The part of ζ that belongs to the noisy mean is 1/(2n) times the mean slope of what follows, ½ for a ReLU at β = 0;
    the part of the noisy variance, which depends on the Fisher information of γ, is left out.

    Attributes:
        size: n.
    """

    size: int

    def __call__(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Add the gradient before each step; hooks run in order, so that clipping has been done."""
        kinds = Site, nn.BatchNorm2d
        gains = [m.weight for m in network.modules() if isinstance(m, kinds) and m.weight is not None]

        def decay(*_: object) -> None:
            for gain in gains:
                if gain.grad is not None:
                    gain.grad.add_(gain.detach(), alpha=1 / (2 * self.size))

        optimizer.register_step_pre_hook(decay)


def _sites(network: nn.Module) -> list[Site]:
    return [module for module in network.modules() if isinstance(module, Site)]
