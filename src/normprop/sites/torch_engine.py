"""E = Σ c m and V = Σ c² v of layers, with their gradients written out, in few passes over the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normprop.sites.rows import Form, Operands, excess_basis, from_rows, given_moments, per_channel, root, to_rows, vectors

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class VectorGradients(NamedTuple):
    """Gradients of what is per output channel, ``(O,)`` each.

    Attributes:
        factor: f, the factor itself, which a site's multiplied filters carry.
        first: ∂L/∂E.
        second: ∂L/∂V.
        average: ∂L/∂(means of the filters), None for zero.
    """

    factor: Tensor
    first: Tensor
    second: Tensor
    average: Tensor | None


# Large weights are handled a block of filters at a time, which stays in the cores' caches from one operation to the next:
# 2¹⁷ numbers a thread.
_BLOCK = 1 << 17


class NoLayer:
    """A site without a layer: E and V are the moments of what it normalises."""

    multiplied = False

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


class SmallLayers:
    """Layers of one form and shape, all at once; their filters come multiplied by the factor.

    Args:
        form: of the layers.
    """

    multiplied = True

    def __init__(self, form: Form) -> None:
        self.form = form

    def statistics(self, sites: Sequence[Operands]) -> tuple[Tensor, Tensor, Tensor]:
        """Filters in rows ``(layers · groups, filters, fan-in)``; E and V, ``(layers · O,)``."""
        rows = [to_rows(s.weight, self.form) for s in sites if s.weight is not None]
        c = rows[0] if len(rows) == 1 else torch.cat(rows)
        if self.form.center:
            c = c - c.mean(-1, keepdim=True)
        mean, var = vectors(self.form, sites, c)
        first = c.new_zeros(c.shape[:2]) if mean is None else _row_sums(c, mean)
        second = _row_sums(c * c, var)
        if self.form.stride != 1:
            first, second = first * self.form.share, second * self.form.share
        basis = self._basis(sites, var)
        if basis is not None:
            second = second + (c @ basis.mT).square().sum(-1)
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
            G.sub_(G.mean(-1, keepdim=True))
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


class LargeLayer:
    """One ungrouped layer whose weight is worth going through only once: nothing of its size is written but its gradient.

    Its filters come as they are, with factor and, where they are to be centred, means beside them.

    Args:
        form: of the layer.
    """

    multiplied = False

    def __init__(self, form: Form) -> None:
        self.form = form

    def statistics(self, sites: Sequence[Operands]) -> tuple[Tensor | None, Tensor, Tensor]:
        """E and V, ``(O,)`` each, and before them, if filters are to be centred, their means w̄ and Σ W v: ``(2, O)``.

        For centred filters ``E = Σ W m − w̄ Σ m`` and ``V = Σ W² v − 2 w̄ Σ W v + w̄² Σ v``, which is zero where nothing but
        rounding is left of it.
        """
        rows, mean, var = self._operands(sites)
        first, second, average, weighted = rows.new_zeros(4, len(rows))
        for w, e, v, a, u, block in self._blocks(rows, first, second, average, weighted):
            if mean is not None:
                torch.mv(w, mean, out=e)
            if self.form.center:
                torch.mean(w, 1, out=a)
                if var is not None:
                    torch.mv(w, var, out=u)
            torch.mul(w, w, out=block)
            if var is None:
                torch.sum(block, 1, out=v)
            else:
                torch.mv(block, var, out=v)
        if self.form.center:
            if mean is not None:
                first = first - average * mean.sum()
            total = rows.shape[1] if var is None else var.sum()
            weighted = average * rows.shape[1] if var is None else weighted
            shared = average.square() * total
            second = second - 2.0 * average * weighted + shared
            second = torch.where(second > 16 * torch.finfo(second.dtype).eps * shared, second, 0.0)
        if self.form.stride != 1:
            first, second = first * self.form.share, second * self.form.share
        return torch.stack([average, weighted]) if self.form.center else None, first, second

    def filters(self, _kept: Tensor | None, sites: Sequence[Operands], _factor: Tensor) -> list[Tensor]:
        """The filters themselves."""
        return [s.weight.view_as(s.weight) for s in sites if s.weight is not None]

    def backward(
        self,
        sites: Sequence[Operands],
        average: Tensor | None,
        G: Tensor | None,
        vectors_of: VectorGradients,
        need: Sequence[Sequence[bool]],
    ) -> list[Gradients]:
        """Gradients of weight, mean and variance; ``G + m ∂E + 2 v c ∂V`` is written to G.

        Of centred filters, c = W − w̄, m ∂E + 2 v c ∂V loses its mean over each filter, and ∂L/∂w̄ comes in evenly. Beside
        2 v W ∂V all of it is of the form a m + b v + r, with numbers a, b and r a filter.
        """
        (site,) = sites
        assert site.weight is not None
        rows, mean, var = self._operands(sites)
        e, v = vectors_of.first * self.form.share, vectors_of.second * self.form.share
        grad: Tensor | None = None
        if need[0][0]:
            grad = torch.zeros_like(rows) if G is None else to_rows(G, self.form, like=site.weight)[0]
        even, basis = self._even(rows, mean, var, average, vectors_of.average, e, v)
        crossed = None if average is None or var is None else average[0] * v
        d_mean, d_var = rows.new_zeros(2, rows.shape[1])
        for w, e_, v_, g, r, x, block in self._blocks(rows, e, v, grad, even, crossed):
            if mean is not None:
                d_mean.addmv_(w.t(), e_)
            if var is not None:
                d_var.addmv_(torch.mul(w, w, out=block).t(), v_)
            if x is not None:
                d_var.addmv_(w.t(), x, alpha=-2.0)
            if g is not None:
                torch.mul(w, v_.unsqueeze(1), out=block)
                if var is None:
                    g.add_(block, alpha=2.0)
                else:
                    g.addcmul_(block, var, value=2.0)
                if r is not None:
                    g.addmm_(r, basis)
                elif mean is not None:
                    g.addr_(e_, mean)
        if average is not None:
            d_mean -= torch.dot(average[0], e)
            d_var += torch.dot(average[0].square(), v)
        weight = None if grad is None else from_rows(grad.unsqueeze(0), site.weight, self.form)
        by_mean, by_var = (
            per_channel(d.unsqueeze(0), self.form, site.weight, [like])[0] if like is not None and needed else None
            for d, like, needed in ((d_mean, site.mean, need[0][1]), (d_var, site.var, need[0][2]))
        )
        return [(weight, by_mean, by_var)]

    def _operands(self, sites: Sequence[Operands]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Filters in rows ``(O, fan-in)``, m and v ``(fan-in,)``."""
        assert sites[0].weight is not None
        rows = to_rows(sites[0].weight, self.form)
        mean, var = vectors(self.form, sites, rows)
        return rows[0], None if mean is None else mean[0], None if var is None else var[0]

    def _blocks(self, rows: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Runs of filters with what belongs to them, and memory for as many numbers."""
        step = max(1, _BLOCK * torch.get_num_threads() // max(1, rows.shape[1]))
        block = rows.new_empty(min(step, len(rows)), rows.shape[1])
        count = -(-len(rows) // step)
        runs = [[None] * count if t is None else t.split(step) for t in others]
        for w, *few in zip(rows.split(step), *runs, strict=True):
            yield (w, *few, block if len(w) == len(block) else block[: len(w)])

    @staticmethod
    def _even(
        rows: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        average: Tensor | None,
        given: Tensor | None,
        e: Tensor,
        v: Tensor,
    ) -> tuple[Tensor | None, Tensor]:
        """Of centred filters' gradients what is no multiple of W: numbers a filter ``(O, n)`` times rows ``(n, fan-in)``."""
        if average is None:
            return None, rows
        count = rows.shape[1]
        flat = torch.zeros_like(e) if given is None else given / count
        numbers, basis = [], []
        if mean is not None:
            numbers.append(e)
            basis.append(mean)
            flat = flat - e * mean.mean()
        if var is None:
            flat = flat - 2.0 * v * average[0]
        else:
            numbers.append(-2.0 * v * average[0])
            basis.append(var)
            flat = flat - 2.0 * v * (average[1] - average[0] * var.sum()) / count
        return torch.stack([*numbers, flat], 1), torch.stack([*basis, torch.ones_like(rows[0])])


Sums = NoLayer | SmallLayers | LargeLayer


def _row_sums(rows: Tensor, values: Tensor | None) -> Tensor:
    """``Σ_i rows[g, o, i] values[g, i]``. A batched product of few rows is ten times slower than the sum of products."""
    if values is None:
        return rows.sum(-1)
    if rows.shape[1] < 8:
        return (rows * values.unsqueeze(1)).sum(-1)
    return torch.bmm(rows, values.unsqueeze(-1)).squeeze(-1)
