"""Along what filters the input of a layer varies most: a few eigenvectors of its covariance, found by the layer itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from normprop.errors import NotFiniteError
from normprop.sites.rows import Form, Operands, from_rows, to_rows, vectors

# More directions are followed than are kept, and so often multiplied with the covariance.
_MORE = 4
_ROUNDS = 2
# The variance that directions are compared with is at least this part of the mean over all of them.
_LEAST = 0.01
# Filters with no more inputs have all of their covariance measured, if what they see is no more numbers than these.
_SMALL, _ROOM = 32, 1 << 24


def principal_directions(
    layer: Callable[[Tensor, int], Tensor],
    batches: int,
    form: Form,
    given: Operands,
    count: int,
    *,
    channel: int,
    shrinkage: float = 0.0,
) -> Tensor | None:
    """U of a layer's input x, with which ``Var c·x ≈ λ (Σ c² v + Σ_r (Σ c √v U_r)²)`` for the filters c that occur.

    The covariance of x in units of its predicted standard deviations √v, C, gets ``λ (1 + U Uᵀ)`` in its place, with the
    eigenvectors u_r of its largest eigenvalues λ_r, ``U_r = √(λ_r/λ − 1) u_r`` and λ the mean of the others (derived). The
    layer itself measures it. Small filters have all of C: the layer's output for unit filters is what a filter sees. Of
    large ones subspace iteration asks for C Q alone, which is the layer's output for filters Q and the gradient that these
    get. Where filters lose all of their mean only such ones are looked at. Shrunk by α, U_r is
    ``√((1 − α)(λ_r/λ − 1)) u_r``.

    Args:
        layer: its output for given filters on the batch of a number, without a bias.
        batches: how many there are.
        form: of the layer, which isn't transposed.
        given: its weight, and the moments of its input.
        count: how many directions to find.
        channel: dimension of the output's channels.
        shrinkage: α.

    Returns:
        ``(groups · R, I/groups, …)`` with R ≤ count, None if filters have too few weights for any.

    Raises:
        NotFiniteError: there are values that can't be squared.
    """
    assert given.weight is not None
    rows = to_rows(given.weight, form)
    room = rows.shape[-1] - (form.center == 1)
    kept = min(count, room - 1)
    if kept < 1:
        return None
    covariance = _Covariance(layer, batches, form, given)
    if rows.shape[-1] <= _SMALL and covariance.count * rows.shape[0] * rows.shape[-1] <= _ROOM * batches:
        values, found = _eigenvectors(covariance.whole(channel), covariance.noise)
        rest = values[:, kept:].sum(-1)
    else:
        values, found, rest = _iterated(covariance, rows, kept, room)
    mean = (values[:, :kept].sum(-1) + rest) / room
    typical = torch.maximum(rest / (room - kept), _LEAST * mean)
    excess = torch.where(typical > 0, values[:, :kept].T / typical, 1.0).T - 1.0
    top = found[:, :kept]
    sign = torch.gather(top, -1, top.abs().argmax(-1, keepdim=True)).sign()
    top = top * sign * ((1.0 - shrinkage) * excess.clamp(min=0)).sqrt().unsqueeze(-1)
    return from_rows(top, given.weight, form)


def _iterated(covariance: _Covariance, rows: Tensor, kept: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors, the first `kept` of which are right, and an estimate of the sum of all other values."""
    followed = min(kept + _MORE, room)
    generator = torch.Generator().manual_seed(0)
    size = (2, len(rows), followed, rows.shape[-1])
    start, probes = covariance.within(torch.randn(size, generator=generator).to(rows))
    found = _orthonormal(start)
    for _ in range(_ROUNDS if followed < room else 0):  # all that there are need not be turned
        found = _orthonormal(covariance(found))
    values, turn = _eigenvectors(found @ covariance(found).mT, covariance.noise)
    found = turn @ found
    rest = values[:, kept:].sum(-1)
    if room > followed:
        probes = torch.nn.functional.normalize(probes - probes @ found.mT @ found, dim=-1)
        rest = rest + (probes * covariance(probes)).sum(-1).mean(-1) * (room - followed)
    return values, found, rest


def _eigenvectors(products: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues from the largest on, zero where they are no more than noise, and eigenvectors in rows."""
    if not bool(torch.isfinite(products).all()):
        raise NotFiniteError("values in front of a layer are not finite, or too large to be squared.")
    values, turn = torch.linalg.eigh(products)
    return torch.where(values > noise, values, 0.0).flip(-1), turn.mT.flip(-2)


class _Covariance:
    """C as a function of rows ``(groups, q, fan-in)``: their products with it.

    Args:
        layer: see `principal_directions`, and so on.
    """

    def __init__(self, layer: Callable[[Tensor, int], Tensor], batches: int, form: Form, given: Operands) -> None:
        assert given.weight is not None
        self.layer, self.batches, self.weight, self.form = layer, batches, given.weight, form
        rows = to_rows(given.weight, form)
        var = vectors(form, [given], rows)[1]
        inverse = torch.ones_like(rows[:, 0]) if var is None else torch.where(var > 0, var, torch.inf).rsqrt()
        self.inverse = inverse.unsqueeze(1)
        self.normal = torch.nn.functional.normalize(self.inverse, dim=-1) if form.center == 1 else None
        ones, count = self._moment(rows[:, :1], torch.ones_like)
        self.mean, self.count = ones / count, count
        # What rounding leaves of an input that doesn't vary.
        self.noise = 100 * torch.finfo(rows.dtype).eps * (self.mean * self.inverse).square().sum(-1)

    def within(self, rows: Tensor) -> Tensor:
        """The part of rows which stands for filters that can occur."""
        return rows if self.normal is None else rows - (rows * self.normal).sum(-1, keepdim=True) * self.normal

    def __call__(self, rows: Tensor) -> Tensor:
        filters = rows * self.inverse
        second, _ = self._moment(filters, lambda out: out)
        centred = second / self.count - (filters @ self.mean.mT) * self.mean
        return self.within(centred * self.inverse)

    def whole(self, channel: int) -> Tensor:
        """C itself, ``(groups, fan-in, fan-in)``."""
        groups, _, size = self.mean.shape
        units = torch.eye(size).to(self.mean).expand(groups, -1, -1)
        filters = from_rows(units, self.weight, self.form)
        total = torch.zeros_like(units)
        for batch in range(self.batches):
            seen = self.layer(filters, batch).movedim(channel, 0).reshape(groups, size, -1).to(total)
            seen = (seen - self.mean.mT) * self.inverse.mT
            total = total + seen @ seen.mT
        return self.within(self.within(total / self.count).mT)

    def _moment(self, rows: Tensor, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        """Σ x h(c·x) over all that filters c see, and how many patches these are."""
        total, count = torch.zeros_like(rows), 0
        with torch.enable_grad():
            filters = from_rows(rows, self.weight, self.form).detach().requires_grad_()
            for batch in range(self.batches):
                out = self.layer(filters, batch)
                (gradient,) = torch.autograd.grad(out, filters, weigh(out.detach()))
                total += to_rows(gradient, self.form, like=self.weight)
                count += out.numel() // len(filters)
        return total, count


def _orthonormal(rows: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(rows.mT)[0]
    return basis.mT
