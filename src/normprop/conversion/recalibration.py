"""Calibration in the midst of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normprop.conversion.calibration import calibrate, samples
from normprop.conversion.entry import Entry, Key
from normprop.conversion.epsilon import bounded
from normprop.conversion.lane import Lane, converted_lane, sites_of
from normprop.conversion.output_statistics import output_statistics
from normprop.conversion.site_constants import Statistics, free_sites, keep_function, set_constants
from normprop.errors import NormPropError
from normprop.graph.example_inputs import Inputs
from normprop.optim import FIRST_MOMENTS, MAXIMA, SECOND_MOMENTS
from normprop.sites.site import Site, SiteArguments, site_statistics

# Of γ and β of every site.
Affines = Sequence[tuple[nn.Parameter, nn.Parameter]]


def recalibrate(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    data: Any,
    *,
    directions: int | None = 8,
    shrinkage: float = 0.0,
) -> nn.Module:
    """Calibrate again while training, without a change of what the network computes.

    Filters turn towards what their inputs have in common, and predictions that were right at the start fall behind: after a
    few hundred steps the standard deviation of a layer may be several times the predicted one, and its gradient out of
    proportion. This measures again, every few thousand samples say, and gives the difference to γ, as
    ``calibrate(…, preserve=True)``. What `optimizer` remembers of gradients goes along (derived): γ' = s γ and β' = β + c γ
    compute the same, so that ∂L/∂γ' = (∂L/∂γ − c ∂L/∂β)/s and ∂L/∂β' = ∂L/∂β. Memories of squares are divided by s², of
    magnitudes by |s|. No sample of a training step sees another one. `keep_calibrated` calls it when it is due.

    Args:
        model: a network that `convert` made.
        optimizer: that trains it, or several that do; the memories of SGD, Adam and its relatives, RMSprop and Adagrad are
            known.
        data: some training samples, as for `calibrate`; other ones each time.
        directions: as for `calibrate`; None keeps those that were measured before, and then each sample takes a single pass.
        shrinkage: as for `calibrate`.

    Returns:
        The model.

    Raises:
        NormPropError, NotFiniteError: as `calibrate`.

    Example:
        >>> import torch, normprop
        >>> net = normprop.convert(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> x = torch.randn(256, 4).cumsum(1)
        >>> before = net(x)
        >>> bool(torch.allclose(normprop.recalibrate(net, optimizer, x)(x), before, atol=1e-5))
        True
    """
    lane = converted_lane(model, "recalibrate")
    affines = affines_of(lane)
    before = [(gamma.detach().clone(), beta.detach().clone()) for gamma, beta in affines]
    if directions is None:
        measure_again(model, lane, samples(data, next(model.parameters()).device, lane.example, model))
    else:
        calibrate(model, data, directions=directions, shrinkage=shrinkage, preserve=True)
    for one in [optimizer] if isinstance(optimizer, Optimizer) else optimizer:
        take_along(one, affines, before)
    return model


@torch.no_grad()
def measure_again(model: nn.Module, lane: Lane, batches: Sequence[Inputs]) -> None:
    """`calibrate` with ``preserve=True`` and the directions that there are: constants follow what one pass measures.

    As the function stays, what later layers see doesn't hang on the constants of earlier ones.

    Raises:
        NormPropError: the lane is of the paper's form; one value per channel.
        NotFiniteError: values in the network are not finite.
    """
    if lane.method != "exact":
        raise NormPropError("the paper's form has no constants to calibrate.\nConvert with method='exact'.")
    measured, functions = output_statistics(model, lane, batches)
    missing = {e.key: lane.function(model, e) for e in lane.all_entries() if e.key not in functions}

    def standards(entry: Entry, call: SiteArguments, mean: Tensor, var: Tensor) -> Statistics:
        if entry.key not in measured:
            return mean, var
        average, square = measured[entry.key]
        return average, bounded(entry, call, square, var)

    reparametrise(model, lane, standards, {**missing, **functions})


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module) -> None:
    """Give an average of a network the network's constants, and the γ and β with which it computes what it did before.

    γ and β of two networks can be averaged where their constants are the same.

    Args:
        average: a copy of the network with other parameters; changed.
        model: the network.
    """
    lane = converted_lane(average, "follow")
    sites = {
        entry.site: (average.get_submodule(entry.site), model.get_submodule(entry.site)) for entry in lane.all_entries()
    }
    for mine, theirs in sites.values():
        if isinstance(theirs, Site) and isinstance(mine, Site):
            mine.center = theirs.center
    kept = {entry.key: lane.function(average, entry) for entry in lane.all_entries()}
    for mine, theirs in sites.values():
        if isinstance(theirs, Site) and isinstance(mine, Site) and theirs.directions is not None:
            mine.directions = nn.Parameter(theirs.directions.detach().clone(), requires_grad=False)

    def constants(entry: Entry, _: SiteArguments, mean: Tensor, var: Tensor) -> Statistics:
        theirs: Any = sites[entry.site][1]
        shift, scale = (t[entry.call] if t.dim() == 2 else t for t in (theirs.shift, theirs.scale))
        return mean + shift * var.sqrt(), scale * var

    reparametrise(average, lane, constants, kept)


@torch.no_grad()
def reparametrise(
    model: nn.Module,
    lane: Lane,
    standards: Callable[[Entry, SiteArguments, Tensor, Tensor], Statistics],
    kept: Mapping[Key, Statistics],
) -> None:
    """Standardise by other statistics, and change γ and β so that the function stays.

    Args:
        model: a converted network.
        lane: its lane.
        standards: mean and variance to standardise by, for every site and call, what `site_scales` takes for it, and the
            computed E and V of it.
        kept: factor and offset of all calls.
    """
    owners = free_sites(model)
    for entry in lane.all_entries():
        site: Any = model.get_submodule(entry.site)
        call = lane.arguments(model, entry)
        _, mean, var = site_statistics(call)
        free = entry.call == 0 and site in owners
        target = keep_function(site, *kept[entry.key], standards(entry, call, mean, var), free=free)
        set_constants(site, entry.call, target, mean, var)


def affines_of(lane: Lane) -> Affines:
    """γ and β of every site that has both."""
    return [(s.weight, s.bias) for s in sites_of([lane]) if s.weight is not None and s.bias is not None]


@torch.no_grad()
def take_along(optimizer: Optimizer, affines: Affines, before: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Change what an optimizer remembers of γ.

    Args:
        optimizer: whose state is changed.
        affines: γ and β as they are.
        before: γ and β as they were.
    """
    for (gamma, beta), (old_gamma, old_beta) in zip(affines, before, strict=True):
        of_gamma, of_beta = (optimizer.state.get(t, {}) for t in (gamma, beta))
        back = torch.where(gamma == 0, 1.0, old_gamma / gamma)  # 1/s
        moved = torch.where(old_gamma == 0, 0.0, (beta - old_beta) / old_gamma)  # c
        for key in _gradients(of_gamma):
            known = isinstance(of_beta.get(key), Tensor)
            of_gamma[key].sub_(moved * of_beta[key] if known else 0.0).mul_(back)
        for keys, factor in ((SECOND_MOMENTS, back.square()), (MAXIMA, back.abs())):
            for key in keys:
                if isinstance(of_gamma.get(key), Tensor):
                    of_gamma[key].mul_(factor)


def _gradients(state: dict[str, Any]) -> list[str]:
    """What in an optimizer's state is a mean of gradients: RMSprop's momentum is one of steps, which don't feel s."""
    return [
        key
        for key in FIRST_MOMENTS
        if isinstance(state.get(key), Tensor) and not (key == "momentum_buffer" and "square_avg" in state)
    ]
