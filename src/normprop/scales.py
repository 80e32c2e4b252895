"""Factor and offset of normalisation sites, many at once in one autograd function."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normprop.filter_rows import Form, Operands, from_rows, to_rows, vectors
from normprop.filter_sums import LargeLayer, NoLayer, SmallLayers, Sums, VectorGradients

_FIELDS = len(Operands._fields)
# Layers with fewer weights than this cost more for their operations than for their numbers.
_SMALL = 1 << 16


class Scale(NamedTuple):
    """What a site makes of the layer before it: ``u = factor · ((filters − average) ∗ x) + offset``.

    Attributes:
        filters: the layer's weight; None for a site without a layer.
        factor: ``f = γ/√(kV)``, ``(O,)``; None if the filters are multiplied by it already.
        offset: ``b = β − (E + d) f``, ``(O,)``.
        average: mean of each filter, ``(O,)``; None if the filters are centred already, or are not to be.
    """

    filters: Tensor | None
    factor: Tensor | None
    offset: Tensor
    average: Tensor | None = None


def scales(forms: Sequence[Form], operands: Sequence[Operands]) -> list[Scale]:
    """The scales of several sites (METHOD §3): E = Σ c m and V = Σ c² v for the filters c, or the moments themselves.

    A variance of zero (a filter of zeros) counts as one. Small filters come multiplied by their factor. Differentiable
    twice, in eager mode by a function that handles all sites together, under `torch.compile`, `torch.export` and the
    transforms of `torch.func` in plain operations, which give all filters multiplied.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        flat: Any = _computed(_buckets(forms, operands, all_at_once=True), operands)[0]
        return [Scale(*flat[i : i + 4]) for i in range(0, len(flat), 4)]
    outputs = _Scales.apply(tuple(forms), *(t for one in operands for t in one))
    return [Scale(*outputs[i : i + 4]) for i in range(0, len(outputs), 4)]


def plain_scale(form: Form, given: Operands, *, multiplied: bool) -> Scale:
    """The scale of one site in plain operations, which say what `scales` computes."""
    filters, first, second = plain_statistics(form, given)
    factor = given.gamma * _inverse_root(given.scale, second)
    offset = given.beta - (first + given.shift) * factor
    if given.weight is None or filters is None or not multiplied:
        average = to_rows(given.weight, form).mean(-1).reshape(-1) if given.weight is not None and form.center else None
        return Scale(given.weight, factor, offset, average)
    rows = to_rows(filters, form)
    return Scale(from_rows(rows * factor.reshape(*rows.shape[:2], 1), filters, form), None, offset)


def plain_statistics(form: Form, given: Operands) -> tuple[Tensor | None, Tensor, Tensor]:
    """The filters c of a layer, None without one, with E and V, ``(O,)`` each."""
    if given.weight is None:
        return NoLayer().statistics([given])
    rows = to_rows(given.weight, form)
    rows = rows - rows.mean(-1, keepdim=True) if form.center else rows
    mean, var = vectors(form, [given], rows)
    square = rows.square() if var is None else rows.square() * var.unsqueeze(1)
    second = form.share * square.sum(-1).reshape(-1)
    first = torch.zeros_like(second) if mean is None else form.share * (rows * mean.unsqueeze(1)).sum(-1).reshape(-1)
    return from_rows(rows, given.weight, form), first, second


def _inverse_root(scale: Tensor, var: Tensor) -> Tensor:
    """``1/√(kV)``; a variance of zero counts as one."""
    return (scale * torch.where(var > 0, var, 1.0)).rsqrt()


class _Scales(torch.autograd.Function):
    """`plain_scale` for several sites, with the derivatives written out (derived).

    For G = ∂L/∂filters, h = ∂L/∂f and g = ∂L/∂b, and with r = 1/√(kV):

        q = h − g (E + d)      ∂L/∂γ = q r      ∂L/∂β = g      ∂L/∂E = −g f      ∂L/∂V = −½ q f / V
        ∂L/∂c = G + m ∂L/∂E + 2 v c ∂L/∂V, less its mean over each filter where filters are centred
        ∂L/∂m = Σ_o c ∂L/∂E    ∂L/∂v = Σ_o c² ∂L/∂V

    and where filters come multiplied, with G' = ∂L/∂(f c): h = Σ G' c and G = f G'. What is per channel is computed for all
    sites together, and what is per weight for all small layers of one shape. The gradient of a large layer's weight is
    written into G: what one layer's filters got is nobody else's. Differentiated again, the backward is `plain_scale`'s.
    """

    @staticmethod
    def forward(ctx: Any, forms: tuple[Form, ...], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        sites = _sites(tensors)
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
            return (None, *_plain_backward(ctx.forms, buckets, saved[:count], grads))
        sites, kept = _sites(saved[:count]), saved[count:-4]
        first, second, inverse, factor = saved[-4:]
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
        for i, by_gamma, by_beta in zip(order, (q * inverse).split(sizes), g.split(sizes), strict=True):
            results[_FIELDS * i + 3 : _FIELDS * i + 5] = by_gamma, by_beta
        return (None, *results)


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
) -> tuple[list[Tensor | None], list[Tensor | None], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The scales, flat; what each bucket keeps for a backward; E + d, V, r and f of all channels in the buckets' order."""
    order = [i for bucket in buckets for i in bucket.members]
    found = [bucket.sums.statistics([sites[i] for i in bucket.members]) for bucket in buckets]
    gamma, beta, shift, scale = (_joined([getattr(sites[i], k) for i in order]) for k in Operands._fields[3:])
    first, second = _joined([three[1] for three in found]) + shift, _joined([three[2] for three in found])
    inverse = _inverse_root(scale, second)
    factor = gamma * inverse
    offset = torch.addcmul(beta, first, factor, value=-1)
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
    return outputs, [three[0] for three in found], (first, second, inverse, factor)


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
    """Whether a layer is small; all groups of a grouped one are worked on at once, too."""
    return site.weight is not None and (form.groups > 1 or site.weight.numel() < _SMALL)


def _layout(site: Operands) -> tuple[Hashable, ...]:
    """What small layers that are handled together have in common."""
    weight, mean, var = site[:3]
    assert weight is not None
    return weight.shape, weight.stride(), weight.dtype, mean is None, var is None


def _sites(tensors: Sequence[Tensor | None]) -> list[Operands]:
    return [Operands(*tensors[i : i + _FIELDS]) for i in range(0, len(tensors), _FIELDS)]  # type: ignore[arg-type]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _or_zero(grad: Tensor | None, site: Operands) -> Tensor:
    return torch.zeros_like(site.gamma) if grad is None else grad


def _plain_backward(
    forms: Sequence[Form], buckets: Sequence[_Bucket], tensors: Sequence[Any], grads: Sequence[Any]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again."""
    multiplied = {i for bucket in buckets if bucket.sums.multiplied for i in bucket.members}
    outputs: list[Tensor | None] = []
    for i, (form, site) in enumerate(zip(forms, _sites(tensors), strict=True)):
        outputs += plain_scale(form, site, multiplied=i in multiplied)
    known = [(out, g) for out, g in zip(outputs, grads, strict=True) if out is not None and g is not None]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad([out for out, _ in known], wanted, [g for _, g in known], create_graph=True, allow_unused=True)
    )
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]
