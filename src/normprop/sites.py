"""Normalisation sites: what takes BatchNorm's place, as differentiable arithmetic on parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.rules.linear import weight_moments, wide


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


def standardiser(site: Site, mean: Tensor, var: Tensor, call: int) -> tuple[Tensor, Tensor]:
    """Factor and offset of ``γ (z − E − d)/√(k V) + β`` (METHOD §3), one each a channel.

    A variance of zero (a filter of zeros) counts as one, so that nothing is divided by zero.
    """
    shift, scale = (t[call] if t.dim() == 2 else t for t in (site.shift, site.scale))
    var = torch.where(var > 0, var, 1.0)
    factor = (wide(scale) * var).rsqrt()
    if site.weight is not None:
        factor = factor * wide(site.weight)
    offset = -(mean + wide(shift)) * factor
    return factor, offset if site.bias is None else offset + wide(site.bias)


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
    filters = centred(wide(weight), groups, bool(transposed_stride)) if center else wide(weight)
    mean, var = statistics(filters, x, channel=channel, groups=groups, transposed_stride=transposed_stride)
    factor, offset = standardiser(site, mean, var, call)
    if transposed_stride:
        per_filter = factor.reshape(groups, 1, -1, *(1,) * (filters.dim() - 2))
        scaled = (filters.unflatten(0, (groups, -1)) * per_filter).flatten(0, 1)
    else:
        scaled = filters * factor.reshape(-1, *(1,) * (filters.dim() - 1))
    return scaled.to(weight.dtype), offset.to(weight.dtype)


def effective_affine(site: Site, x: Moments, *, channel: int, call: int = 0) -> tuple[Tensor, Tensor]:
    """Factor and offset, of the rank of the tensor, for a site that does not follow a linear layer.

    Args:
        site: the normalisation.
        x: moments of what it normalises.
        channel: its channel dimension.
        call: which of the site's calls this is.
    """
    channels = x.channels(channel).expanded((site.shift.shape[-1],))
    factor, offset = standardiser(site, channels.mean, channels.var, call)
    shape = [1] * x.mean.dim()
    shape[channel] = -1
    return factor.reshape(shape), offset.reshape(shape)


def apply_affine(x: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """``x · factor + offset`` in x's own dtype (autocast may have made it narrower than the parameters)."""
    return torch.addcmul(offset.to(x.dtype), x, factor.to(x.dtype))
