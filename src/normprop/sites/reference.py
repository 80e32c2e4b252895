"""What sites compute, in plain operations: what the fast functions are to give, and how they are differentiated twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normprop.double_backward import gradients_again
from normprop.sites.rows import Form, Operands, excess_basis, from_rows, given_moments, least, sites_of, to_rows, vectors


class Scale(NamedTuple):
    """What a site makes of the layer before it.

    Attributes:
        weight: ``f c``, the effective weight, in the shape of the layer's own; None for a site without a layer.
        factor: ``f = γ/√(kV)``, ``(O,)``, of a site without a layer: ``u = f z + b``; else None.
        offset: ``b = β − (E + d√V) f``, ``(O,)``.
    """

    weight: Tensor | None
    factor: Tensor | None
    offset: Tensor


def plain_scale(form: Form, given: Operands) -> Scale:
    """The scale of one site in plain operations, which say what all engines compute."""
    filters, factor, offset = parts(form, given)
    if given.weight is None or filters is None:
        return Scale(None, factor, offset)
    rows = to_rows(filters, form)
    return Scale(from_rows(rows * factor.reshape(*rows.shape[:2], 1), filters, form), None, offset)


def parts(form: Form, given: Operands) -> tuple[Tensor | None, Tensor, Tensor]:
    """The filters c, less what is subtracted of their mean (None without a layer), f and b, apart."""
    filters, first, second = plain_statistics(form, given)
    factor = given.gamma * inverse_root(given.scale, second)
    offset = given.beta - first * factor - given.gamma * given.shift * given.scale.rsqrt()
    return filters, factor, offset


def plain_statistics(form: Form, given: Operands) -> tuple[Tensor | None, Tensor, Tensor]:
    """The filters c of a layer, None without one, with E and V, ``(O,)`` each."""
    if given.weight is None:
        return None, *given_moments(given)
    rows = to_rows(given.weight, form)
    average = form.center * rows.mean(-1, keepdim=True) if form.center else None
    rows = rows if average is None else rows - average
    mean, var = vectors(form, [given], rows)
    second = variances(rows, average, var)
    if given.directions is not None:
        basis = excess_basis(to_rows(given.directions, form, like=given.weight), var)
        along = (rows @ basis.mT).square().sum(-1) / form.share
        second = torch.where(second > 0, second + along, 0.0)
    second = (form.share * second).reshape(-1)
    first = torch.zeros_like(second) if mean is None else form.share * (rows * mean.unsqueeze(1)).sum(-1).reshape(-1)
    return from_rows(rows, given.weight, form), first, second


def variances(rows: Tensor, average: Tensor | None, var: Tensor | None) -> Tensor:
    """``Σ c² v`` of filters in rows; zero where it is what rounding leaves of a centred filter of equal weights, or `least`.

    Args:
        rows: c, ``(…, filters, fan-in)``.
        average: what centring took away from each filter; None where nothing was.
        var: v, one value per weight of a filter, ``(…, fan-in)``; None for 1.
    """
    second = (rows.square() if var is None else rows.square() * var.unsqueeze(-2)).sum(-1)
    if average is None:
        return torch.where(second > least(second.dtype), second, 0.0)
    total = rows.shape[-1] if var is None else var.sum(-1, keepdim=True)
    rounding = 16.0 * torch.finfo(rows.dtype).eps * average.squeeze(-1)
    return torch.where(second > (rounding.square() * total).clamp(min=least(second.dtype)), second, 0.0)


def inverse_root(scale: Tensor, var: Tensor) -> Tensor:
    """``1/√(kV)``; a variance of zero counts as one."""
    return (scale * torch.where(var > 0, var, 1.0)).rsqrt()


def plain_backward(forms: Sequence[Form], tensors: Sequence[Any], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the operands of several sites, from those of their scales, that can be differentiated again."""
    compute = lambda given: [t for form, one in zip(forms, sites_of(given), strict=True) for t in plain_scale(form, one)]
    return gradients_again(compute, tensors, grads)
