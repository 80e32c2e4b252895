"""Calibration in the midst of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normprop.conversion.calibration import calibrate
from normprop.conversion.lane import converted_lane, sites_of
from normprop.optim import FIRST_MOMENTS, SECOND_MOMENTS
from normprop.sites.site import Site


def recalibrate(
    model: nn.Module, optimizer: Optimizer, data: Any, *, directions: int = 8, shrinkage: float = 0.0
) -> nn.Module:
    """Calibrate again while training, without a change of what the network computes.

    Filters turn towards what their inputs have in common, and predictions that were right at the start fall behind: after a
    few hundred steps the standard deviation of a layer may be several times the predicted one, and its gradient out of
    proportion. This measures again, every few thousand samples say, and gives the difference to γ, as
    ``calibrate(…, preserve=True)``. What `optimizer` remembers of gradients goes along (derived): γ' = s γ and β' = β + c γ
    compute the same, so that ∂L/∂γ' = (∂L/∂γ − c ∂L/∂β)/s and ∂L/∂β' = ∂L/∂β. Memories of squares are divided by s². No
    sample of a training step sees another one.

    Args:
        model: a network that `convert` made.
        optimizer: that trains it; momenta of SGD and of Adam's relatives are known.
        data: some training samples, as for `calibrate`; other ones each time.
        directions: as for `calibrate`.
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
    found = sites_of([converted_lane(model, "recalibrate")])
    sites = [site for site in found if site.weight is not None and site.bias is not None]
    before = [tuple(t.detach().clone() for t in _affine(site)) for site in sites]
    calibrate(model, data, directions=directions, shrinkage=shrinkage, preserve=True)
    for site, old in zip(sites, before, strict=True):
        _take_along(optimizer, _affine(site), old)
    return model


@torch.no_grad()
def _take_along(optimizer: Optimizer, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> None:
    """Change what the optimizer remembers of γ, given it and β as they are and were."""
    (gamma, beta), (old_gamma, old_beta) = new, old
    back = torch.where(gamma == 0, 1.0, old_gamma / gamma)  # 1/s
    moved = torch.where(old_gamma == 0, 0.0, (beta - old_beta) / old_gamma)  # c
    of_gamma, of_beta = (optimizer.state.get(t, {}) for t in (gamma, beta))
    for key in FIRST_MOMENTS:
        if isinstance(of_gamma.get(key), Tensor):
            known = isinstance(of_beta.get(key), Tensor)
            of_gamma[key].sub_(moved * of_beta[key] if known else 0.0).mul_(back)
    for key in SECOND_MOMENTS:
        if isinstance(of_gamma.get(key), Tensor):
            of_gamma[key].mul_(back.square())


def _affine(site: Site) -> tuple[Tensor, Tensor]:
    assert site.weight is not None
    assert site.bias is not None
    return site.weight, site.bias
