"""Normalisation sites: what takes BatchNorm's place, as differentiable arithmetic on parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.effective import EffectiveWeight
from normprop.rules.linear import full_precision, weight_moments, wide


class Site(nn.Module):
    """The parameters of one normalisation, under BatchNorm's own names.

    A converted network reads them in its moment lane; the module itself is not called.

    Attributes:
        weight: γ, ``(C,)``, or None.
        bias: β, ``(C,)``, or None.
        shift: d, ``(C,)``, constant: what calibration adds to the computed mean. ``(calls, C)`` if the site is used
            several times in one forward.
        scale: k, of the same shape, constant: what calibration multiplies the computed variance with.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.shift = nn.Parameter(shift, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def extra_repr(self) -> str:
        """Number of channels and of calls."""
        calls = f", calls={self.shift.shape[0]}" if self.shift.dim() == 2 else ""
        return f"{self.shift.shape[-1]}{calls}"


def standard_normal(like: Tensor, shape: tuple[int, ...]) -> Moments:
    """Moments of a standardised input: mean 0 and variance 1 everywhere."""
    like = wide(like)
    return Moments(like.new_zeros(shape), like.new_ones(shape))


def given_moments(mean: Tensor, var: Tensor) -> Moments:
    """Moments of an input which is not standardised, kept as constants of the network."""
    return Moments(mean, var)


def site_moments(site: Site, rank: int, channel: int) -> Moments:
    """What leaves a site: ``u = γ û + β ~ N(β, γ²)`` (METHOD §3).

    Args:
        site: the site.
        rank: rank of the tensor described.
        channel: its channel dimension.
    """
    shape = [1] * rank
    shape[channel] = -1
    like = wide(site.shift[0] if site.shift.dim() == 2 else site.shift)
    mean = torch.zeros_like(like) if site.bias is None else wide(site.bias)
    var = torch.ones_like(like) if site.weight is None else wide(site.weight).square()
    return Moments(mean.reshape(shape), var.reshape(shape))


def centred(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Each filter minus its mean (over all its inputs and taps)."""
    if not transposed:
        return weight - weight.mean(dim=tuple(range(1, weight.dim())), keepdim=True)
    filters: Tensor = weight.unflatten(0, (groups, -1))
    return (filters - filters.mean(dim=(1, *range(3, filters.dim())), keepdim=True)).flatten(0, 1)


def statistics(
    weight: Tensor, x: Moments, *, channel: int, groups: int = 1, transposed_stride: int = 0
) -> tuple[Tensor, Tensor]:
    """``E_o = Σ W m`` and ``V_o = Σ W² v``, vectors over the output channels of a linear map (METHOD §3).

    Args:
        weight: as the layer stores it.
        x: moments of the layer's input.
        channel: the input's channel dimension.
        groups: of a grouped convolution.
        transposed_stride: product of the strides of a transposed convolution, else 0.
    """
    inputs = weight.shape[0] if transposed_stride else weight.shape[1] * groups
    channels = x.channels(channel).expanded((inputs,))
    return weight_moments(weight, channels.mean, channels.var, groups=groups, transposed_stride=transposed_stride)


def effective_weight(
    weight: Tensor,
    site: Site,
    x: Moments,
    *,
    channel: int,
    groups: int = 1,
    transposed_stride: int = 0,
    center: bool = False,
    call: int = 0,
) -> tuple[Tensor, Tensor]:
    """Weight and bias with which the plain layer computes the normalised one.

    ``W_eff = W γ/√(kV)`` and ``b_eff = β − (E + d) γ/√(kV)`` (METHOD §3). A bias that the layer had is taken away by the
    normalisation and does not appear.

    Args:
        weight: the layer's weight, ``(O, I/groups, …)``, or ``(I, O/groups, …)`` if transposed.
        site: the normalisation after the layer.
        x: moments of the layer's input.
        channel: channel dimension of the input.
        groups: of a grouped convolution.
        transposed_stride: product of the strides of a transposed convolution, else 0.
        center: subtract each filter's mean first.
        call: which of the site's calls this is.

    Returns:
        Effective weight in the weight's own shape and dtype, effective bias ``(O,)``.
    """
    filters = wide(weight)
    inputs = filters.shape[0] if transposed_stride else filters.shape[1] * groups
    channels = x.channels(channel).expanded((inputs,))
    taps = filters[0, 0].numel()
    rows = filters.unflatten(0, (groups, -1))
    rows = rows.transpose(1, 2).flatten(2) if transposed_stride else rows.flatten(2)
    # An output position of a transposed convolution sees one tap in so many.
    share = 1.0 / transposed_stride if transposed_stride else 1.0
    mean, var = (per_tap(t.to(rows.dtype) * share, groups, taps) for t in (channels.mean, channels.var))
    shift, scale, gamma, beta = (t.to(rows.dtype).reshape(groups, -1) for t in constants(site, call))
    with full_precision(weight):
        effective, bias, _, _ = EffectiveWeight.apply(rows, mean, var, gamma, beta, shift, scale, center)
    if transposed_stride:
        effective = effective.unflatten(2, (-1, taps)).transpose(1, 2)
    return effective.reshape(weight.shape).to(weight.dtype), bias.reshape(-1).to(weight.dtype)


def per_tap(channels: Tensor, groups: int, taps: int) -> Tensor:
    """A value per input channel, ``(I,)``, as one per weight of a filter: ``(groups, I/groups · taps)``."""
    grouped = channels.reshape(groups, -1)
    return grouped if taps == 1 else grouped.unsqueeze(-1).expand(-1, -1, taps).flatten(1)


def constants(site: Site, call: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d, k, γ and β of one call of a site, ``(C,)`` each."""
    shift, scale = (t[call] if t.dim() == 2 else t for t in (site.shift, site.scale))
    gamma = torch.ones_like(shift) if site.weight is None else site.weight
    beta = torch.zeros_like(shift) if site.bias is None else site.bias
    return shift, scale, gamma, beta


def effective_affine(site: Site, x: Moments, *, channel: int, call: int = 0) -> tuple[Tensor, Tensor]:
    """Factor and offset, of the rank of the tensor, for a site that does not follow a linear layer.

    Args:
        site: the normalisation.
        x: moments of what it normalises.
        channel: its channel dimension.
        call: which of the site's calls this is.
    """
    channels = x.channels(channel).expanded((site.shift.shape[-1],))
    shift, scale, gamma, beta = (wide(t) for t in constants(site, call))
    var = torch.where(channels.var > 0, channels.var, 1.0)
    factor = gamma * (scale * var).rsqrt()
    offset = beta - (channels.mean + shift) * factor
    shape = [1] * x.mean.dim()
    shape[channel] = -1
    return factor.reshape(shape), offset.reshape(shape)


def apply_affine(x: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """``x · factor + offset`` in x's own dtype (autocast may have made it narrower than the parameters)."""
    return torch.addcmul(offset.to(x.dtype), x, factor.to(x.dtype))
