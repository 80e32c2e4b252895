"""Scales of sites in torch operations: one autograd function for all of them, with the gradients written out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normprop.sites.reference import inverse_root, plain_backward, variances
from normprop.sites.rows import (
    Form,
    Operands,
    excess_basis,
    from_rows,
    given_moments,
    per_channel,
    root,
    sites_of,
    to_rows,
    vectors,
)

_FIELDS = len(Operands._fields)
# Layers with fewer weights than this cost more for their operations than for their numbers.
_SMALL = 1 << 16

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class VectorGradients(NamedTuple):
    """Gradients of what is per output channel, ``(O,)`` each.

    Attributes:
        factor: f, the factor itself, which a site's multiplied filters carry.
        first: ∂L/∂E.
        second: ∂L/∂V.
    """

    factor: Tensor
    first: Tensor
    second: Tensor


class NoLayer:
    """A site without a layer: E and V are the moments of what it normalises."""

    def statistics(self, sites: Sequence[Operands]) -> tuple[None, Tensor, Tensor]:
        """No filters, E and V."""
        (site,) = sites
        return None, *given_moments(site)

    def filters(self, _kept: None, _sites: Sequence[Operands], _factor: Tensor) -> list[None]:
        """None, for each site."""
        return [None]

    def backward(
        self, sites: Sequence[Operands], _kept: None, _G: None, vectors_of: VectorGradients, _need: Sequence[Sequence[bool]]
    ) -> list[Gradients]:
        """Gradients of weight, mean and variance of each site."""
        (site,) = sites
        e, v = vectors_of.first, vectors_of.second
        mean, var = (None if t is None else d.reshape(t.shape).to(t.dtype) for d, t in ((e, site.mean), (v, site.var)))
        return [(None, mean, var)]


class Layers:
    """Layers of one form and shape, all at once.

    Args:
        form: of the layers.
    """

    def __init__(self, form: Form) -> None:
        self.form = form

    def statistics(self, sites: Sequence[Operands]) -> tuple[Tensor, Tensor, Tensor]:
        """Filters in rows ``(layers · groups, filters, fan-in)``; E and V, ``(layers · O,)``."""
        rows = [to_rows(s.weight, self.form) for s in sites if s.weight is not None]
        c = rows[0] if len(rows) == 1 else torch.cat(rows)
        average = c.mean(-1, keepdim=True).mul_(self.form.center) if self.form.center else None
        c = c if average is None else c - average
        mean, var = vectors(self.form, sites, c)
        first = c.new_zeros(c.shape[:2]) if mean is None else _row_sums(c, mean)
        second = variances(c, average, var)
        if self.form.stride != 1:
            first, second = first * self.form.share, second * self.form.share
        basis = self._basis(sites, var)
        if basis is not None:
            second = torch.where(second > 0, second + (c @ basis.mT).square().sum(-1), 0.0)
        return c, first.reshape(-1), second.reshape(-1)

    def filters(self, kept: Tensor, sites: Sequence[Operands], factor: Tensor) -> list[Tensor]:
        """``f c``, in the shape of each weight."""
        scaled = kept * factor.reshape(*kept.shape[:2], 1)
        return [
            from_rows(part, s.weight, self.form)
            for part, s in zip(scaled.split(self.form.groups), sites, strict=True)
            if s.weight is not None
        ]

    def factor_gradient(
        self, kept: Tensor, sites: Sequence[Operands], grads: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """G' in rows, and ``∂L/∂f = Σ G' c``."""
        pairs = zip(grads, sites, strict=True)
        zeros = kept.new_zeros(()).expand(self.form.groups, *kept.shape[1:])
        G = torch.cat([zeros if g is None else to_rows(g, self.form, like=s.weight) for g, s in pairs])
        return G, (G * kept).sum(-1).reshape(-1)

    def backward(
        self, sites: Sequence[Operands], kept: Tensor, G: Tensor, vectors_of: VectorGradients, need: Sequence[Sequence[bool]]
    ) -> list[Gradients]:
        """Gradients of weight, mean and variance of each site; G is written to."""
        c, form = kept, self.form
        f, e, v = (t.reshape(*c.shape[:2], 1) for t in vectors_of[:3])
        if form.stride != 1:
            e, v = e * form.share, v * form.share
        mean, var = vectors(form, sites, c)
        scaled = c * v
        G.mul_(f)
        if mean is not None:
            G.addcmul_(e, mean.unsqueeze(1))
        if var is None:
            G.add_(scaled, alpha=2.0)
        else:
            G.addcmul_(scaled, var.unsqueeze(1), value=2.0)
        basis, along = self._basis(sites, var), None
        if basis is not None:
            along = (c @ basis.mT).mul_(2.0 * v)
            G.baddbmm_(along, basis)
        if form.center:
            G.sub_(G.mean(-1, keepdim=True), alpha=float(form.center))
        weight = sites[0].weight
        assert weight is not None
        means: Sequence[Tensor | None] = [None] * len(sites)
        variances = means
        if any(n[1] for n in need):
            means = per_channel((c * e).sum(1), form, weight, [s.mean for s in sites if s.mean is not None])
        if any(n[2] for n in need):
            by_var = (c * scaled).sum(1)
            if along is not None and var is not None:
                by_var += ((along.mT @ c) * self._directions(sites)).sum(1) * torch.where(var > 0, 0.5 / root(var), 0.0)
            variances = per_channel(by_var, form, weight, [s.var for s in sites if s.var is not None])
        weights = [
            from_rows(part, s.weight, form)
            for part, s in zip(G.split(form.groups), sites, strict=True)
            if s.weight is not None
        ]
        return list(zip(weights, means, variances, strict=True))

    def _directions(self, sites: Sequence[Operands]) -> Tensor:
        """U of layers that all have some, ``(layers · groups, R, fan-in)``."""
        return torch.cat([to_rows(s.directions, self.form, like=s.weight) for s in sites if s.directions is not None])

    def _basis(self, sites: Sequence[Operands], var: Tensor | None) -> Tensor | None:
        return None if sites[0].directions is None else excess_basis(self._directions(sites), var)


Sums = NoLayer | Layers


def _row_sums(rows: Tensor, values: Tensor | None) -> Tensor:
    """``Σ_i rows[g, o, i] values[g, i]``. A batched product of few rows is ten times slower than the sum of products."""
    if values is None:
        return rows.sum(-1)
    if rows.shape[1] < 8:
        return (rows * values.unsqueeze(1)).sum(-1)
    return torch.bmm(rows, values.unsqueeze(-1)).squeeze(-1)


class TorchScales(torch.autograd.Function):
    """`plain_scale` of several sites, with the derivatives written out (derived).

    For G = ∂L/∂filters, h = ∂L/∂f and g = ∂L/∂b, and with r = 1/√(kV):

        q = h − g E      ∂L/∂γ = q r − g d/√k      ∂L/∂β = g      ∂L/∂E = −g f      ∂L/∂V = −½ q f / V
        ∂L/∂c = G + m ∂L/∂E + 2 v c ∂L/∂V, less its mean over each filter where filters are centred
        ∂L/∂m = Σ_o c ∂L/∂E    ∂L/∂v = Σ_o c² ∂L/∂V

    and with G' = ∂L/∂(f c): h = Σ G' c and G = f G'. What is per channel is computed for all sites together, and what is per
    weight for all small layers of one shape. Differentiated again, the backward is `plain_scale`'s.

    With directions and p_r = Σ c √v U_r, ∂L/∂c has 2 ∂L/∂V Σ_r p_r √v U_r besides, and ∂L/∂v has Σ_o ∂L/∂V Σ_r p_r c U_r/√v.
    """

    @staticmethod
    def forward(ctx: Any, forms: tuple[Form, ...], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Weight, factor and offset of every site."""
        sites = sites_of(tensors)
        ctx.forms, ctx.buckets = forms, buckets_of(forms, sites)
        ctx.set_materialize_grads(False)
        outputs, kept, vectors_of = computed(ctx.buckets, sites)
        ctx.save_for_backward(*tensors, *kept, *vectors_of)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """See the class; nothing for sites that nobody asked."""
        saved, buckets = ctx.saved_tensors, ctx.buckets
        count = _FIELDS * len(ctx.forms)
        if torch.is_grad_enabled():
            return (None, *plain_backward(ctx.forms, saved[:count], grads))
        sites, kept = sites_of(saved[:count]), saved[count:-5]
        first, second, inverse, factor, shifted = saved[-5:]
        order = [i for bucket in buckets for i in bucket.members]
        by_filters, by_factor = [], []
        for bucket, filters in zip(buckets, kept, strict=True):
            members = bucket.members
            if isinstance(bucket.sums, Layers):
                G, h = bucket.sums.factor_gradient(filters, [sites[i] for i in members], [grads[3 * i] for i in members])
            else:
                G, h = None, _or_zero(grads[3 * members[0] + 1], sites[members[0]])
            by_filters.append(G)
            by_factor.append(h)
        g = _joined([_or_zero(grads[3 * i + 2], sites[i]) for i in order])
        q = torch.addcmul(_joined(by_factor), g, first, value=-1)
        by_gamma = torch.addcmul(q * inverse, g, shifted, value=-1)
        by_first = (g * factor).neg_()
        by_second = torch.where(second > 0, q * factor / second, 0.0).mul_(-0.5)
        results: list[Tensor | None] = [None] * count
        for bucket, filters, G in zip(buckets, kept, by_filters, strict=True):
            few = [sites[i] for i in bucket.members]
            needs = [ctx.needs_input_grad[1 + _FIELDS * i :][:3] for i in bucket.members]
            f, e, v = (t[bucket.channels] for t in (factor, by_first, by_second))
            part = VectorGradients(f, e, v)
            for i, three in zip(bucket.members, bucket.sums.backward(few, filters, G, part, needs), strict=True):
                results[_FIELDS * i : _FIELDS * i + 3] = three
        sizes = [len(sites[i].gamma) for i in order]
        for i, gamma, beta in zip(order, by_gamma.split(sizes), g.split(sizes), strict=True):
            results[_FIELDS * i + 3 : _FIELDS * i + 5] = gamma, beta
        asked = [any(g is not None for g in grads[i : i + 3]) for i in range(0, len(grads), 3)]
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


def computed(
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
    outputs: list[Tensor | None] = [None] * (3 * len(sites))
    sizes = [len(sites[i].gamma) for i in order]
    for i, f, b in zip(order, factor.split(sizes), offset.split(sizes), strict=True):
        outputs[3 * i + 1 : 3 * i + 3] = f, b
    kept: Any
    for bucket, (kept, *_) in zip(buckets, found, strict=True):
        filters = bucket.sums.filters(kept, [sites[i] for i in bucket.members], factor[bucket.channels])
        for i, c in zip(bucket.members, filters, strict=True):
            outputs[3 * i] = c
            if c is not None:
                outputs[3 * i + 1] = None
    return outputs, [three[0] for three in found], (first, second, inverse, factor, shifted)


def buckets_of(forms: Sequence[Form], sites: Sequence[Operands]) -> list[_Bucket]:
    """Who is handled together: small layers of one form and shape, and any other site by itself."""
    members: dict[Hashable, list[int]] = {}
    for i, (form, site) in enumerate(zip(forms, sites, strict=True)):
        together = site.weight is not None and site.weight.numel() < _SMALL
        members.setdefault((form, *_layout(site)) if together else i, []).append(i)
    buckets, start = [], 0
    for few in members.values():
        form, weight = forms[few[0]], sites[few[0]].weight
        end = start + sum(len(sites[i].gamma) for i in few)
        buckets.append(_Bucket(few, slice(start, end), NoLayer() if weight is None else Layers(form)))
        start = end
    return buckets


def _layout(site: Operands) -> tuple[Hashable, ...]:
    """What small layers that are handled together have in common."""
    weight, mean, var = site[:3]
    assert weight is not None
    ranks = None if site.directions is None else site.directions.shape[0]
    return weight.shape, weight.stride(), weight.dtype, mean is None, var is None, ranks


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _or_zero(grad: Tensor | None, site: Operands) -> Tensor:
    return torch.zeros_like(site.gamma) if grad is None else grad
