"""Factor and offset of normalisation sites, many at once in one autograd function."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normprop.native.operands import handles, handles_whole
from normprop.sites.c_engine import native_scales
from normprop.sites.reference import Scale, inverse_root, plain_backward
from normprop.sites.rows import Form, Operands, sites_of
from normprop.sites.torch_engine import LargeLayer, NoLayer, SmallLayers, Sums, VectorGradients
from normprop.sites.traced_engine import whole_scales

_FIELDS = len(Operands._fields)
# Layers with fewer weights than this cost more for their operations than for their numbers.
_SMALL = 1 << 16
# With fewer weights than this in all, a graph compiler does better with plain operations than with one that it has to call.
_WHOLE = 1 << 19


def scales(forms: Sequence[Form], operands: Sequence[Operands]) -> list[Scale]:
    """The scales of several sites (METHOD §3): E = Σ c m and V = Σ c² v for the filters c, or the moments themselves.

    With directions U_r, which say along what the layer's input varies more than its channels do by themselves, it is
    V = Σ c² v + Σ_r (Σ c √v U_r)² (derived: the variance of c·x for inputs of covariance √v (1 + Σ_r U_r U_rᵀ) √v).
    A variance of zero (a filter of zeros) counts as one. Differentiable twice, by a function that handles all sites
    together, compiled or else of torch's operations, which leave large filters as they are; the others come multiplied by
    their factor. In exported graphs and the transforms of `torch.func` it is plain operations.
    """
    tensors = [t for one in operands for t in one]
    if handles_whole(tensors, operands[0].gamma.dtype) and _weights(operands) >= _WHOLE:
        return whole_scales(forms, operands)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        plain: Any = _computed(_buckets(forms, operands, all_at_once=True), operands)[0]
        return [Scale(*plain[i : i + 4]) for i in range(0, len(plain), 4)]
    if handles(tensors, operands[0].gamma.dtype):
        return native_scales(forms, operands)
    outputs = _Scales.apply(tuple(forms), *tensors)
    return [Scale(*outputs[i : i + 4]) for i in range(0, len(outputs), 4)]


class _Scales(torch.autograd.Function):
    """`plain_scale` for several sites, with the derivatives written out (derived).

    For G = ∂L/∂filters, h = ∂L/∂f and g = ∂L/∂b, and with r = 1/√(kV):

        q = h − g E      ∂L/∂γ = q r − g d/√k      ∂L/∂β = g      ∂L/∂E = −g f      ∂L/∂V = −½ q f / V
        ∂L/∂c = G + m ∂L/∂E + 2 v c ∂L/∂V, less its mean over each filter where filters are centred
        ∂L/∂m = Σ_o c ∂L/∂E    ∂L/∂v = Σ_o c² ∂L/∂V

    and where filters come multiplied, with G' = ∂L/∂(f c): h = Σ G' c and G = f G'. What is per channel is computed for all
    sites together, and what is per weight for all small layers of one shape. The gradient of a large layer's weight is
    written into G: what one layer's filters got is nobody else's. Differentiated again, the backward is `plain_scale`'s.

    With directions and p_r = Σ c √v U_r, ∂L/∂c has 2 ∂L/∂V Σ_r p_r √v U_r besides, and ∂L/∂v has Σ_o ∂L/∂V Σ_r p_r c U_r/√v.
    """

    @staticmethod
    def forward(ctx: Any, forms: tuple[Form, ...], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        sites = sites_of(tensors)
        ctx.forms, ctx.buckets = forms, _buckets(forms, sites)
        ctx.set_materialize_grads(False)
        outputs, kept, vectors_of = _computed(ctx.buckets, sites)
        ctx.save_for_backward(*tensors, *kept, *vectors_of)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, buckets = ctx.saved_tensors, ctx.buckets
        count = _FIELDS * len(ctx.forms)
        if torch.is_grad_enabled():
            multiplied = {i for bucket in buckets if bucket.sums.multiplied for i in bucket.members}
            return (None, *plain_backward(ctx.forms, [i in multiplied for i in range(len(ctx.forms))], saved[:count], grads))
        sites, kept = sites_of(saved[:count]), saved[count:-5]
        first, second, inverse, factor, shifted = saved[-5:]
        order = [i for bucket in buckets for i in bucket.members]
        by_filters, by_factor = [], []
        for bucket, filters in zip(buckets, kept, strict=True):
            members = bucket.members
            if bucket.sums.multiplied:
                G, h = bucket.sums.factor_gradient(filters, [sites[i] for i in members], [grads[4 * i] for i in members])
            else:
                G, h = grads[4 * members[0]], _or_zero(grads[4 * members[0] + 1], sites[members[0]])
            by_filters.append(G)
            by_factor.append(h)
        g = _joined([_or_zero(grads[4 * i + 2], sites[i]) for i in order])
        q = torch.addcmul(_joined(by_factor), g, first, value=-1)
        by_gamma = torch.addcmul(q * inverse, g, shifted, value=-1)
        by_first = (g * factor).neg_()
        by_second = torch.where(second > 0, q * factor / second, 0.0).mul_(-0.5)
        results: list[Tensor | None] = [None] * count
        for bucket, filters, G in zip(buckets, kept, by_filters, strict=True):
            few = [sites[i] for i in bucket.members]
            needs = [ctx.needs_input_grad[1 + _FIELDS * i :][:3] for i in bucket.members]
            f, e, v = (t[bucket.channels] for t in (factor, by_first, by_second))
            part = VectorGradients(f, e, v, grads[4 * bucket.members[0] + 3])
            for i, three in zip(bucket.members, bucket.sums.backward(few, filters, G, part, needs), strict=True):
                results[_FIELDS * i : _FIELDS * i + 3] = three
        sizes = [len(sites[i].gamma) for i in order]
        for i, gamma, beta in zip(order, by_gamma.split(sizes), g.split(sizes), strict=True):
            results[_FIELDS * i + 3 : _FIELDS * i + 5] = gamma, beta
        asked = [any(g is not None for g in grads[i : i + 4]) for i in range(0, len(grads), 4)]
        return (None, *(g if asked[i // _FIELDS] else None for i, g in enumerate(results)))


class _Bucket(NamedTuple):
    """Sites that are handled together.

    Attributes:
        members: their numbers.
        channels: their part of the vectors that hold all sites' channels.
        sums: how E and V are computed.
    """

    members: list[int]
    channels: slice
    sums: Sums


def _computed(
    buckets: Sequence[_Bucket], sites: Sequence[Operands]
) -> tuple[list[Tensor | None], list[Tensor | None], tuple[Tensor, ...]]:
    """The scales, flat; what each bucket keeps for a backward; E, V, r, f and d/√k of all channels in the buckets' order."""
    order = [i for bucket in buckets for i in bucket.members]
    found = [bucket.sums.statistics([sites[i] for i in bucket.members]) for bucket in buckets]
    gamma, beta, shift, scale = (_joined([getattr(sites[i], k) for i in order]) for k in ("gamma", "beta", "shift", "scale"))
    first, second = _joined([three[1] for three in found]), _joined([three[2] for three in found])
    inverse = inverse_root(scale, second)
    factor = gamma * inverse
    shifted = shift * scale.rsqrt()
    offset = torch.addcmul(torch.addcmul(beta, first, factor, value=-1), gamma, shifted, value=-1)
    outputs: list[Tensor | None] = [None] * (4 * len(sites))
    sizes = [len(sites[i].gamma) for i in order]
    for i, f, b in zip(order, factor.split(sizes), offset.split(sizes), strict=True):
        outputs[4 * i + 1 : 4 * i + 3] = f, b
    kept: Any
    for bucket, (kept, *_) in zip(buckets, found, strict=True):
        filters = bucket.sums.filters(kept, [sites[i] for i in bucket.members], factor[bucket.channels])
        for i, c in zip(bucket.members, filters, strict=True):
            outputs[4 * i] = c
            if bucket.sums.multiplied:
                outputs[4 * i + 1] = None
            elif kept is not None:
                outputs[4 * i + 3] = kept[0]
    return outputs, [three[0] for three in found], (first, second, inverse, factor, shifted)


def _buckets(forms: Sequence[Form], sites: Sequence[Operands], *, all_at_once: bool = False) -> list[_Bucket]:
    """Who is handled together: small layers of one form and shape; with `all_at_once`, large ones like small ones alone."""
    members: dict[Hashable, list[int]] = {}
    for i, (form, site) in enumerate(zip(forms, sites, strict=True)):
        members.setdefault((form, *_layout(site)) if _together(form, site) else i, []).append(i)
    buckets, start = [], 0
    for few in members.values():
        form, weight = forms[few[0]], sites[few[0]].weight
        end = start + sum(len(sites[i].gamma) for i in few)
        sums: Sums = NoLayer()
        if weight is not None:
            sums = SmallLayers(form) if all_at_once or _together(form, sites[few[0]]) else LargeLayer(form)
        buckets.append(_Bucket(few, slice(start, end), sums))
        start = end
    return buckets


def _together(form: Form, site: Operands) -> bool:
    """Whether a layer is small; all groups of a grouped one are worked on at once, and one with directions at all, too."""
    if site.weight is None:
        return False
    return form.groups > 1 or site.directions is not None or site.weight.numel() < _SMALL


def _layout(site: Operands) -> tuple[Hashable, ...]:
    """What small layers that are handled together have in common."""
    weight, mean, var = site[:3]
    assert weight is not None
    ranks = None if site.directions is None else site.directions.shape[0]
    return weight.shape, weight.stride(), weight.dtype, mean is None, var is None, ranks


def _weights(operands: Sequence[Operands]) -> int:
    return sum(one.weight.numel() for one in operands if one.weight is not None)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _or_zero(grad: Tensor | None, site: Operands) -> Tensor:
    return torch.zeros_like(site.gamma) if grad is None else grad
