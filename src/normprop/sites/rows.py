"""Weights of linear layers as rows of filters, and values per input channel as values per weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# What is subtracted of a mean is a multiple of one over this, which all dtypes hold.
CENTER_STEPS = 256


class Form(NamedTuple):
    """What of a layer the arithmetic of its site depends on, besides tensors.

    Attributes:
        groups: of a grouped convolution.
        transposed: a transposed convolution, whose filters lie along dimension 1.
        stride: of a transposed convolution, the product over dimensions; 1 for any other layer.
        center: how much of each filter's mean is subtracted, from 0 to 1 in steps of 1/256.
    """

    groups: int = 1
    transposed: bool = False
    stride: int = 1
    center: float = 0.0

    @property
    def center_steps(self) -> int:
        """How many 256ths of a mean are subtracted."""
        return round(self.center * CENTER_STEPS)

    @property
    def share(self) -> float:
        """The part of a filter's taps that an output position sees."""
        return 1.0 / self.stride


class Operands(NamedTuple):
    """The tensors of one site.

    Attributes:
        weight: of the layer before the site, ``(O, I/groups, …)``, or ``(I, O/groups, …)`` if transposed; None for a site
            without a layer.
        mean: of the layer's input, or of what a site without a layer normalises: one value a channel in any shape; None
            for 0.
        var: its variance, of the same shape; None for 1.
        gamma: γ, ``(O,)``.
        beta: β, ``(O,)``.
        shift: d, ``(O,)``, constant, in units of √V.
        scale: k, ``(O,)``, constant.
        directions: U, constant: along what filters the layer's input varies more than V counts, in filters' own shape,
            ``(groups · R, I/groups, …)``; None for nothing.
    """

    weight: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    gamma: Tensor
    beta: Tensor
    shift: Tensor
    scale: Tensor
    directions: Tensor | None = None


def sites_of(tensors: Sequence[Tensor | None]) -> list[Operands]:
    """The operands of several sites, which lie one behind the other."""
    width = len(Operands._fields)
    return [Operands(*tensors[i : i + width]) for i in range(0, len(tensors), width)]  # type: ignore[arg-type]  # None stands where a site may have none


def given_moments(site: Operands) -> tuple[Tensor, Tensor]:
    """E and V of a site without a layer: mean and variance of what it normalises, ``(O,)`` each."""
    mean = torch.zeros_like(site.gamma) if site.mean is None else site.mean.reshape(-1).to(site.gamma.dtype)
    if site.var is None:
        return mean, torch.ones_like(site.gamma)
    var = site.var.reshape(-1).to(site.gamma.dtype)
    return mean, torch.where(var > least(var.dtype) ** (2 / 3), var, 0.0)  # a derivative has the power −3/2 of it


def least(dtype: torch.dtype) -> float:
    """The largest variance of a filter that counts as zero: quotients of smaller ones leave the range of the dtype."""
    limits = torch.finfo(dtype)
    return float(limits.tiny / limits.eps)


def to_rows(weight: Tensor, form: Form, *, like: Tensor | None = None) -> Tensor:
    """A weight as ``(groups, filters, fan-in)``, a view where strides allow; taps go first if they do in memory.

    Args:
        weight: the weight, or its gradient.
        form: of the layer.
        like: whose order in memory decides; the weight's own by default.
    """
    if form.transposed:
        split: Tensor = weight.unflatten(0, (form.groups, -1))
        return split.transpose(1, 2).flatten(2)
    if taps_first(weight if like is None else like):
        weight = weight.movedim(1, -1)
    return weight.reshape(form.groups, weight.shape[0] // form.groups, -1)


def from_rows(rows: Tensor, like: Tensor, form: Form) -> Tensor:
    """The inverse of `to_rows` for a weight of the shape and memory format of `like`; any number of filters, if it isn't
    transposed."""
    if form.transposed:
        split: Tensor = rows.unflatten(2, (-1, *like.shape[2:]))
        return split.transpose(1, 2).reshape(like.shape)
    if taps_first(like):
        return rows.reshape(-1, *like.movedim(1, -1).shape[1:]).movedim(-1, 1)
    return rows.reshape(-1, *like.shape[1:])


def vectors(form: Form, sites: Sequence[Operands], rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """m and v of layers of one form and shape, one value a weight of a filter: ``(layers · groups, fan-in)``, or None."""
    assert sites[0].weight is not None
    outside = not form.transposed and taps_first(sites[0].weight)
    mean = _per_tap([s.mean for s in sites if s.mean is not None], form, rows, outside)
    var = _per_tap([s.var for s in sites if s.var is not None], form, rows, outside)
    return mean, var


def excess_basis(directions: Tensor, var: Tensor | None) -> Tensor:
    """``√v U``: what filters are multiplied with to see how far they lie along the directions.

    Args:
        directions: in rows ``(groups, R, fan-in)``.
        var: one value a weight of a filter, ``(groups, fan-in)``; None for 1.
    """
    return directions if var is None else directions * root(var).unsqueeze(1)


def root(var: Tensor) -> Tensor:
    """√v, whose derivative at 0 is taken for 0."""
    return torch.where(var > 0, var, 1.0).sqrt() * (var > 0)


def per_channel(values: Tensor, form: Form, weight: Tensor, likes: Sequence[Tensor]) -> list[Tensor]:
    """The transpose of `vectors`: for each layer the sum over every input channel's taps, in the shape of its moments."""
    inputs = likes[0].numel() // form.groups
    if values.shape[-1] != inputs:
        outside = not form.transposed and taps_first(weight)
        values = values.unflatten(-1, (-1, inputs)).sum(-2) if outside else values.unflatten(-1, (inputs, -1)).sum(-1)
    return [t.reshape(like.shape).to(like.dtype) for t, like in zip(values.split(form.groups), likes, strict=True)]


def taps_first(weight: Tensor) -> bool:
    """Whether the taps of a filter lie outside its inputs in memory, as channels last have it."""
    if weight.dim() == 4:
        return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    return weight.dim() > 2 and not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()


def _per_tap(values: Sequence[Tensor], form: Form, rows: Tensor, outside: bool) -> Tensor | None:
    if not values:
        return None
    grouped = [t.reshape(form.groups, -1).to(rows.dtype) for t in values]
    whole = grouped[0] if len(grouped) == 1 else torch.cat(grouped)
    taps = rows.shape[-1] // whole.shape[-1]
    if taps == 1:
        return whole
    return whole.repeat(1, taps) if outside else whole.repeat_interleave(taps, 1)
