"""What the ablations do to a network before its first step, beyond what a recipe can say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

import normprop
from normprop.channel_moments import Moments
from normprop.conversion.converted import ConvertedModule
from normprop.conversion.lane import site_calls
from normprop.lab.networks.resnet import Block
from normprop.lab.samples.images import Images
from normprop.lab.training.history import Watcher
from normprop.lab.training.preparation import prepared, some
from normprop.lab.training.recipe import Recipe
from normprop.lab.training.seeds import derived
from normprop.optim import UnitNormProjection
from normprop.sites.site import Site, site_moments, site_scales

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
        self.treat(network, optimizer)
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
        """Write so into the graph."""
        assert isinstance(network, ConvertedModule)
        for graph in dict.fromkeys(network.graphs().values()):
            chosen = {
                (call.scales, call.index)
                for call in site_calls(graph).values()
                if call.weight is not None and (self.layers is None or call.layer_path in self.layers)
            }
            for node in graph.nodes:
                if node.target is site_scales:
                    node.args = tuple(
                        (*entry[:3], {**entry[3], "center": entry[3].get("center", False) and (node, i) not in chosen})
                        for i, entry in enumerate(node.args)
                    )
        network.recompile()


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
    assert isinstance(network, ConvertedModule)
    names: dict[fx.Node, str] = {}
    for graph in dict.fromkeys(network.graphs().values()):
        for node in [node for node in graph.nodes if node.target is site_moments]:
            node.args = tuple((site, _proxy(network, graph, names, node, site), *rest) for site, *rest in node.args)
            node.target = proxied_moments
    network.recompile()
    proxies = [parameter for name in names.values() for parameter in network.get_submodule(name).parameters()]
    optimizer.add_param_group({"params": proxies, "weight_decay": 0.0})


def _proxy(network: nn.Module, graph: fx.Graph, names: dict[fx.Node, str], node: fx.Node, site: fx.Node) -> fx.Node:
    """A node for the β̃ and γ̃ of a site."""
    if site not in names:
        names[site] = f"proxy_{len(names)}"
        like = network.get_submodule(str(site.target)).get_parameter("weight")
        zeros = {name: nn.Parameter(torch.zeros_like(like)) for name in ("weight", "bias")}
        network.add_module(names[site], nn.ParameterDict(zeros))
    with graph.inserting_before(node):
        return graph.get_attr(names[site])


def proxied_moments(*calls: tuple[Site, nn.ParameterDict, int, int]) -> list[Moments]:
    """`site_moments` with γ (1 + γ̃) and β + β̃."""
    found = []
    for site, proxy, rank, channel in calls:
        assert site.weight is not None
        assert site.bias is not None
        shape = [len(site.weight) if d == channel % rank else 1 for d in range(rank)]
        gamma, beta = site.weight * (1 + proxy["weight"]), site.bias + proxy["bias"]
        found.append(Moments(beta.reshape(shape), gamma.square().reshape(shape)))
    return found


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

        network.register_forward_pre_hook(disturb)
        optimizer.register_step_post_hook(restore)

    def disturb(self, site: Site) -> None:
        """Once."""
        shift, scale = site.shift.data, site.scale.data
        shift.add_(torch.randn_like(shift) * (scale / self.size).sqrt())
        freedom = self.size - 1
        scale.mul_(torch.distributions.Chi2(torch.full_like(scale, float(freedom))).sample() / freedom)


def _sites(network: nn.Module) -> list[Site]:
    return [module for module in network.modules() if isinstance(module, Site)]
