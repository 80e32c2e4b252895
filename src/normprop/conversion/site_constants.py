"""A site's constants d and k from statistics of its input, and γ and β with which its function stays."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from normprop.sites.site import Site

# Mean and variance.
Statistics = tuple[Tensor, Tensor]


def set_constants(site: Site, call: int, target: Statistics, mean: Tensor, var: Tensor) -> None:
    """d and k with which a site's computed mean and variance become given ones."""
    shift, scale = (t[call] if t.dim() == 2 else t for t in (site.shift, site.scale))
    var = torch.where(var > 0, var, 1.0)
    shift.copy_((target[0].to(mean.dtype) - mean) / var.sqrt())
    scale.copy_(target[1].to(var.dtype) / var)


def free_sites(model: nn.Module) -> set[nn.Module]:
    """Sites whose γ and β are nobody else's."""
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    sites = (module for module in model.modules() if isinstance(module, Site))
    return {site for site in sites if all(holders[id(p)] == 1 for p in (site.weight, site.bias) if p is not None)}


def keep_function(site: Site, factor: Tensor, offset: Tensor, measured: Statistics, *, free: bool) -> Statistics:
    """Statistics with which a site's factor and offset stay, the measured ones if γ and β can take up the difference.

    Args:
        site: whose γ and β are changed if they are free.
        factor: γ/√(kV) as it is.
        offset: as it is.
        measured: mean and variance.
        free: whether γ and β are this call's alone.
    """
    if site.weight is not None and site.bias is not None and free:
        mean, var = (t.to(factor.dtype) for t in measured)
        site.weight.copy_(factor * var.sqrt())
        site.bias.copy_(offset + mean * factor)
        return measured
    gamma = torch.ones_like(factor) if site.weight is None else site.weight.to(factor.dtype)
    beta = torch.zeros_like(offset) if site.bias is None else site.bias.to(offset.dtype)
    safe = torch.where(factor == 0, 1.0, factor)
    mean = torch.where(factor == 0, measured[0].to(factor.dtype), (beta - offset) / safe)
    return mean, torch.where(factor == 0, measured[1].to(factor.dtype), (gamma / safe).square())


def own_output(site: Site, bias: Tensor | None, mean: Tensor, var: Tensor, *, first: bool) -> Statistics:
    """Statistics with which ``γ (z − mean)/√var + β`` is ``z + b``; the site's first call sets γ and β."""
    assert site.weight is not None
    assert site.bias is not None
    offset = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    if first:
        site.weight.copy_(torch.where(var > 0, var, 1.0).sqrt())
        site.bias.copy_(mean + offset)
    return site.bias - offset, site.weight.square()
