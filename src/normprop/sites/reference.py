"""What sites compute, in plain operations: what the fast functions are to give, and how they are differentiated twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normprop.double_backward import gradients_again
from normprop.sites.rows import Form, Operands, excess_basis, from_rows, given_moments, sites_of, to_rows, vectors


class Scale(NamedTuple):
    """What a site makes of the layer before it: ``u = factor · ((filters − average) ∗ x) + offset``.

    Attributes:
        filters: the layer's weight; None for a site without a layer.
        factor: ``f = γ/√(kV)``, ``(O,)``; None if the filters are multiplied by it already.
        offset: ``b = β − (E + d√V) f``, ``(O,)``.
        average: mean of each filter, ``(O,)``; None if the filters are centred already, or are not to be.
    """

    filters: Tensor | None
    factor: Tensor | None
    offset: Tensor
    average: Tensor | None = None


def plain_scale(form: Form, given: Operands, *, multiplied: bool) -> Scale:
    """The scale of one site in plain operations, which say what `scales` computes."""
    filters, first, second = plain_statistics(form, given)
    factor = given.gamma * inverse_root(given.scale, second)
    offset = given.beta - first * factor - given.gamma * given.shift * given.scale.rsqrt()
    if given.weight is None or filters is None or not multiplied:
        average = to_rows(given.weight, form).mean(-1).reshape(-1) if given.weight is not None and form.center else None
        return Scale(given.weight, factor, offset, average)
    rows = to_rows(filters, form)
    return Scale(from_rows(rows * factor.reshape(*rows.shape[:2], 1), filters, form), None, offset)


def plain_statistics(form: Form, given: Operands) -> tuple[Tensor | None, Tensor, Tensor]:
    """The filters c of a layer, None without one, with E and V, ``(O,)`` each."""
    if given.weight is None:
        return None, *given_moments(given)
    rows = to_rows(given.weight, form)
    rows = rows - rows.mean(-1, keepdim=True) if form.center else rows
    mean, var = vectors(form, [given], rows)
    square = rows.square() if var is None else rows.square() * var.unsqueeze(1)
    second = form.share * square.sum(-1).reshape(-1)
    if given.directions is not None:
        basis = excess_basis(to_rows(given.directions, form, like=given.weight), var)
        second = second + (rows @ basis.mT).square().sum(-1).reshape(-1)
    first = torch.zeros_like(second) if mean is None else form.share * (rows * mean.unsqueeze(1)).sum(-1).reshape(-1)
    return from_rows(rows, given.weight, form), first, second


def parts(form: Form, given: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """The centred filters c (the weight itself if they aren't centred), f and b, apart."""
    filters, first, second = plain_statistics(form, given)
    factor = given.gamma * inverse_root(given.scale, second)
    offset = given.beta - first * factor - given.gamma * given.shift * given.scale.rsqrt()
    return filters, factor, offset  # type: ignore[return-value]  # None for a site without a layer


def inverse_root(scale: Tensor, var: Tensor) -> Tensor:
    """``1/√(kV)``; a variance of zero counts as one."""
    return (scale * torch.where(var > 0, var, 1.0)).rsqrt()


def plain_backward(
    forms: Sequence[Form], multiplied: Sequence[bool], tensors: Sequence[Any], grads: Sequence[Any]
) -> list[Tensor | None]:
    """Gradients of the operands of several sites, from those of their scales, that can be differentiated again."""
    outputs: list[Tensor | None] = []
    for form, given, product in zip(forms, sites_of(tensors), multiplied, strict=True):
        outputs += plain_scale(form, given, multiplied=product)
    return gradients_again(outputs, tensors, grads)
