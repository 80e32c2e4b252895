"""Parts of a tensor: slices, entries, windows taken out and put back."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.rules.table import rule

Shape = Sequence[int]
Shapes = Sequence[Shape]


def _plain(x: Any) -> bool:
    if isinstance(x, list):
        return all(type(i) is int for i in x)
    return x is None or x is Ellipsis or isinstance(x, int | slice)


def _is_choice(x: Any) -> bool:
    """Whether an index picks entries of one dimension by their numbers, or by a mask."""
    return isinstance(x, Tensor) and x.dim() == 1


def _has_integers(entries: Sequence[Any]) -> bool:
    return any(type(e) is int or isinstance(e, list) for e in entries)


@rule(operator.getitem)
def getitem(x: Any, index: Any) -> Any:
    """One of several outputs, or a slice: along a dimension over which the moments vary they are sliced too."""
    if not isinstance(x, Moments):
        return x[index]
    entries = list(index) if isinstance(index, tuple) else [index]
    picked = [e for e in entries if _is_choice(e)]
    if not all(_plain(e) or _is_choice(e) for e in entries) or (picked and (len(picked) > 1 or _has_integers(entries))):
        raise NormPropError(
            "an index has no moment rule unless it is a slice, an integer, None, …, or one vector of known integers."
        )
    if any(e is Ellipsis for e in entries):
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        missing = x.mean.dim() - sum(e is not None for e in entries) + 1
        entries[at : at + 1] = [slice(None)] * missing
    dim = 0
    adapted: list[Any] = []
    for entry in entries:
        if entry is None:
            adapted.append(None)
            continue
        constant = max(x.mean.shape[dim], x.var.shape[dim]) == 1
        adapted.append(entry if not constant else slice(None) if isinstance(entry, slice | list | Tensor) else 0)
        dim += 1
    return x.moved(lambda t: t[tuple(adapted)])


@rule(torch.narrow, "narrow")
def narrow(x: Moments, dim: int, start: int, length: int) -> Any:
    """A slice along one dimension."""
    return getitem(x, _at(x, dim, slice(start, start + length)))


@rule(torch.select, "select")
def select(x: Moments, dim: int, index: int) -> Any:
    """One entry of a dimension, which goes."""
    return getitem(x, _at(x, dim, index))


@rule(torch.index_select, "index_select")
def index_select(x: Moments, dim: int, index: Any) -> Any:
    """Entries of a dimension by their numbers, in whatever order."""
    return getitem(x, _at(x, dim, index))


def _at(x: Moments, dim: int, index: Any) -> tuple[Any, ...]:
    return (*(slice(None),) * (dim % x.mean.dim()), index)


@rule("masked_fill", "masked_fill_", torch.masked_fill, standing="approximate",
      reason="what is masked is taken to lie anywhere; numbers that are not finite, to be left out afterwards")  # fmt: skip
def masked_fill(x: Moments, mask: Any, value: Any) -> Moments:
    """A mixture: with the share s of what is masked, ``E = (1−s) m + s c`` and ``E y² = (1−s)(v + m²) + s c²`` (definition).

    The minus infinity that softmax is given for what it shall not see leaves the moments of the rest.
    """
    if isinstance(value, Moments) or not math.isfinite(float(value)):
        return x
    share = mask.mean.mean() if isinstance(mask, Moments) else mask.to(x.mean.dtype).mean()
    mean = (1.0 - share) * x.mean + share * float(value)
    return Moments(mean, (1.0 - share) * x.second + share * float(value) ** 2 - mean.square())


@rule(operator.setitem, shaped=True)
def setitem(x: Moments | Tensor, index: Any, y: Any, *, in_shapes: Shapes, out_shape: Shape) -> Moments:
    """A part is written over: its elements have the moments of what is written, the others keep theirs."""
    entries = list(index) if isinstance(index, tuple) else [index]
    picked = [e for e in entries if _is_choice(e)]
    known = all((_plain(e) and e is not None) or _is_choice(e) for e in entries)
    if not known or (picked and (len(picked) > 1 or _has_integers(entries))):
        raise NormPropError("writing has no moment rule unless to slices, integers, …, or one vector of known integers.")
    at = next((i for i, e in enumerate(entries) if e is Ellipsis), len(entries))
    rank, rest = len(out_shape), [e for e in entries if e is not Ellipsis]
    entries = [*rest[:at], *[slice(None)] * (rank - len(rest)), *rest[at:]]
    if entries[0] != slice(None):
        raise NormPropError("writing to some samples of a batch has no moment rule.")
    x, y = _alike_samples(x, rank, x), _alike_samples(y, rank, x)
    kept = [d for d in range(rank) if type(entries[d]) is not int]  # dimensions of the part
    shape = [
        full if e != slice(None) else x.mean.shape[d] for d, (e, full) in enumerate(zip(entries, out_shape, strict=True))
    ]
    for d, size in zip(reversed(kept), reversed(y.mean.shape), strict=False):
        if size != 1 and entries[d] == slice(None):
            shape[d] = out_shape[d]
    places = torch.arange(math.prod(shape), device=x.mean.device).reshape(shape)
    part = places[tuple(entries)]
    source = places.flatten().index_copy(0, part.flatten(), torch.arange(part.numel(), device=part.device) + places.numel())
    written = (torch.cat([a.expand(shape).flatten(), b.expand(part.shape).flatten()])[source].reshape(shape)
               for a, b in ((x.mean, y.mean), (x.var, y.var)))  # fmt: skip
    return Moments(*written)


def _alike_samples(x: Any, rank: int, like: Any) -> Moments:
    """Moments of what is written or written to, of one size; of a constant, all samples together."""
    if isinstance(x, Moments):
        return x.moved(lambda t: t)
    kind = like.mean if isinstance(like, Moments) else like
    value = torch.as_tensor(x, dtype=kind.dtype, device=kind.device)
    found = Moments(value, torch.zeros_like(value))
    return found.pooled([0]) if value.dim() == rank and len(value) != 1 else found


@rule("unfold", shaped=True)
def unfold(x: Moments, dimension: int, size: int, step: int, *, in_shapes: Shapes, out_shape: Shape) -> Moments:
    """Windows along one dimension become a last one: elements keep their moments."""
    return x.moved(lambda t: t.unsqueeze(-1) if t.shape[dimension] == 1 else t.unfold(dimension, size, step))


@rule(F.unfold, shaped=True)
def patches(
    x: Moments, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1, *, in_shapes: Shapes,
    out_shape: Shape,
) -> Moments:  # fmt: skip
    """im2col: every tap of a channel has the channel's moments, padding not counted, or those of its positions, zeros of the
    padding among them, where these vary.
    """
    if x.mean.shape[2:].numel() > 1 or x.var.shape[2:].numel() > 1:
        whole = x.expanded((x.mean.shape[0], *in_shapes[0][1:]))
        return whole.moved(lambda t: F.unfold(t, kernel_size, dilation, padding, stride))
    taps = out_shape[1] // in_shapes[0][1]
    channels = x.channels().expanded((in_shapes[0][1],))
    return Moments(*(t.repeat_interleave(taps).reshape(1, -1, 1) for t in (channels.mean, channels.var)))


@rule(nn.Unfold, shaped=True)
def patches_module(module: nn.Unfold, x: Moments, *, in_shapes: Shapes, out_shape: Shape) -> Moments:
    """As `patches`."""
    settings = module.kernel_size, module.dilation, module.padding, module.stride
    return patches(x, *settings, in_shapes=in_shapes, out_shape=out_shape)


_BORDERS = "borders and uneven overlaps are averaged; overlapping entries are taken as independent"


@rule(F.fold, standing="approximate", reason=_BORDERS, shaped=True)
def folded(
    x: Moments, output_size: Any, kernel_size: Any, *_: Any, in_shapes: Shapes, out_shape: Shape, **__: Any
) -> Moments:
    """col2im: a position is the sum of the patches which meet there, ``n = taps · patches / positions`` on average."""
    channels = x.channels().expanded((in_shapes[0][1],))
    taps = in_shapes[0][1] // out_shape[1]
    overlap = taps * in_shapes[0][2] / math.prod(out_shape[2:])
    grouped = Moments(*(t.reshape(1, -1, taps, 1) for t in (channels.mean, channels.var))).pooled([2], keepdim=False)
    return Moments(*(t.unsqueeze(-1) * overlap for t in (grouped.mean, grouped.var)))


@rule(nn.Fold, standing="approximate", reason=_BORDERS, shaped=True)
def folded_module(module: nn.Fold, x: Moments, *, in_shapes: Shapes, out_shape: Shape) -> Moments:
    """As `folded`."""
    return folded(x, module.output_size, module.kernel_size, in_shapes=in_shapes, out_shape=out_shape)
