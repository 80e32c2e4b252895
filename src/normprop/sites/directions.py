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


def principal_directions(
    layer: Callable[[Tensor, int], Tensor],
    batches: int,
    form: Form,
    given: Operands,
    count: int,
    *,
    shrinkage: float = 0.0,
) -> Tensor | None:
    """U of a layer's input x, with which ``Var c·x ≈ λ (Σ c² v + Σ_r (Σ c √v U_r)²)`` for the filters c that occur.

    The covariance of x in units of its predicted standard deviations √v, C, gets ``λ (1 + U Uᵀ)`` in its place, with the
    eigenvectors u_r of its largest eigenvalues λ_r, ``U_r = √(λ_r/λ − 1) u_r`` and λ the mean of the others (derived). C is
    never there: subspace iteration asks for C Q alone, which is the layer's own output for filters Q and the gradient that
    these get. Where filters lose all of their mean only such ones are looked at. Shrunk by α, U_r is
    ``√((1 − α)(λ_r/λ − 1)) u_r``.

    Args:
        layer: its output for given filters on the batch of a number, without a bias.
        batches: how many there are.
        form: of the layer, which isn't transposed.
        given: its weight, and the moments of its input.
        count: how many directions to find.
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
    followed = min(kept + _MORE, room)
    covariance = _Covariance(layer, batches, form, given)
    generator = torch.Generator().manual_seed(0)
    size = (2, len(rows), followed, rows.shape[-1])
    start, probes = covariance.within(torch.randn(size, generator=generator).to(rows))
    found = _orthonormal(start)
    for _ in range(_ROUNDS if followed < room else 0):  # all that there are need not be turned
        found = _orthonormal(covariance(found))
    products = found @ covariance(found).mT
    if not bool(torch.isfinite(products).all()):
        raise NotFiniteError("values in front of a layer are not finite, or too large to be squared.")
    values, turn = torch.linalg.eigh(products)
    values, found = torch.where(values > covariance.noise, values, 0.0).flip(-1), (turn.mT @ found).flip(-2)
    rest = values[:, kept:].sum(-1)
    if room > followed:
        probes = torch.nn.functional.normalize(probes - probes @ found.mT @ found, dim=-1)
        rest = rest + (probes * covariance(probes)).sum(-1).mean(-1) * (room - followed)
    mean = (values[:, :kept].sum(-1) + rest) / room
    typical = torch.maximum(rest / (room - kept), _LEAST * mean)
    excess = torch.where(typical > 0, values[:, :kept].T / typical, 1.0).T - 1.0
    top = found[:, :kept]
    sign = torch.gather(top, -1, top.abs().argmax(-1, keepdim=True)).sign()
    top = top * sign * ((1.0 - shrinkage) * excess.clamp(min=0)).sqrt().unsqueeze(-1)
    return from_rows(top, given.weight, form)


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
