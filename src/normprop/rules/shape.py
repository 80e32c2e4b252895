"""Operations that move elements: every one acts on the moments as on the tensor itself."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.rules.table import TABLE, Rule, rule

Shape = Sequence[int]


def reshaped(x: Moments, before: Shape, after: Shape) -> Moments:
    """Moments of ``tensor.reshape(after)`` for a tensor of shape `before`.

    Dimensions are matched in the smallest groups of equal product; a group over which the moments do not vary stays of
    size 1 whatever becomes of it, so nothing of an image's extent is fixed in the result. Where the batch is merged
    with something that varies, the mixture over it is returned.
    """
    shape = _ones_where_constant(x, before)
    mean, var = x.mean.expand(shape), x.var.expand(shape)
    target: list[int] = []
    for old, new in _groups(before, after):
        varies = any(shape[d] != 1 for d in old)
        if varies and 0 in old and any(before[d] != 1 for d in old[1:]) and len(old) > 1:
            pooled = Moments(mean, var).pooled([d for d in old])
            mean, var, varies = pooled.mean, pooled.var, False
        if varies:
            full = [before[d] if d in old else mean.shape[d] for d in range(len(before))]
            mean, var = mean.expand(full), var.expand(full)
        target += [after[d] if varies else 1 for d in new]
    return Moments(mean.reshape(target), var.reshape(target))


def _ones_where_constant(x: Moments, before: Shape) -> list[int]:
    shape = [max(a, b) for a, b in zip(x.mean.shape, x.var.shape, strict=True)]
    if len(shape) != len(before):
        raise NormPropError(f"moments of rank {len(shape)} describe a tensor of rank {len(before)}.")
    return shape


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Split both shapes into the smallest runs of equal product."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [], []
        p = q = 1
        if i < len(before):
            old.append(i)
            p *= before[i]
            i += 1
        if j < len(after):
            new.append(j)
            q *= after[j]
            j += 1
        while p != q:
            if p < q:
                old.append(i)
                p *= before[i]
                i += 1
            else:
                new.append(j)
                q *= after[j]
                j += 1
        groups.append((old, new))
    return groups


@rule(torch.flatten, torch.reshape, torch.unflatten, "view", "reshape", "flatten", "reshape_as", "view_as", "unflatten",
      shaped=True)  # fmt: skip
def reshape(x: Moments, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """Elements keep their moments (see `reshaped`)."""
    return reshaped(x, in_shapes[0], out_shape)


@rule(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, shaped=True)
def reshape_module(module: nn.Module, x: Moments, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """Elements keep their moments, wherever the module puts them."""
    if isinstance(module, nn.PixelShuffle):
        return pixel_shuffle(x, module.upscale_factor)
    if isinstance(module, nn.PixelUnshuffle):
        return pixel_unshuffle(x, module.downscale_factor)
    if isinstance(module, nn.ChannelShuffle):
        return channel_shuffle(x, module.groups)
    return reshaped(x, in_shapes[0], out_shape)


@rule(F.pixel_shuffle)
def pixel_shuffle(x: Moments, upscale_factor: int) -> Moments:
    """r² channels become the phases of one: the mixture of their moments per channel (definition)."""
    phases = upscale_factor**2
    grouped = Moments(*(t.unflatten(1, (t.shape[1] // phases, phases)) for t in (x.mean, x.var)))
    return grouped.pooled([2], keepdim=False)


@rule(F.pixel_unshuffle)
def pixel_unshuffle(x: Moments, downscale_factor: int) -> Moments:
    """Each phase of a channel becomes a channel of its own with the same moments."""
    return Moments(*(t.repeat_interleave(downscale_factor**2, 1) for t in (x.mean, x.var)))


@rule(F.channel_shuffle)
def channel_shuffle(x: Moments, groups: int) -> Moments:
    """Channels change places."""
    return Moments(*(t.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2) for t in (x.mean, x.var)))


def move(method: str, x: Moments, *args: Any, **kwargs: Any) -> Moments:
    """Dimensions change places, or one of size 1 comes or goes: mean and variance follow."""
    mean, var = torch.broadcast_tensors(x.mean, x.var)
    return Moments(getattr(mean, method)(*args, **kwargs), getattr(var, method)(*args, **kwargs))


for _method, _functions in {
    "permute": (torch.permute,),
    "transpose": (torch.transpose,),
    "swapaxes": (torch.swapaxes,),
    "movedim": (torch.movedim,),
    "unsqueeze": (torch.unsqueeze,),
    "t": (torch.t,),
}.items():
    for _key in (_method, *_functions):
        TABLE.add(_key, Rule(move, leading=(_method,)))


@rule(torch.squeeze, "squeeze", shaped=True)
def squeeze(x: Moments, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """Dimensions of size 1 go."""
    return reshaped(x, in_shapes[0], out_shape)


def same(x: Moments, *_: Any, **__: Any) -> Moments:
    """The values stay as they are."""
    return x


def same_module(module: nn.Module, x: Moments) -> Moments:
    """The values stay as they are."""
    return x


for _key in ("contiguous", "clone", "to", "float", "type_as", "detach", "double", "half", "type", "bfloat16",
             torch.clone):  # fmt: skip
    TABLE.add(_key, Rule(same))
for _module in (nn.Identity, nn.UpsamplingNearest2d):
    TABLE.add(_module, Rule(same_module))


@rule("expand", "expand_as", torch.broadcast_to, "broadcast_to", shaped=True)
def expand(x: Moments, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """Repeated elements keep their moments; new leading dimensions have size 1."""
    extra = len(out_shape) - x.mean.dim()
    return Moments(*(t.reshape(*(1,) * extra, *t.shape) for t in (x.mean, x.var)))


@rule("repeat", torch.tile, shaped=True)
def repeat(x: Moments, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """Repeated elements keep their moments."""
    shape = (1,) * (len(out_shape) - x.mean.dim()) + tuple(in_shapes[0])
    full = Moments(*(t.reshape(*(1,) * (len(out_shape) - t.dim()), *t.shape) for t in (x.mean, x.var)))
    times = [1 if f == 1 else o // s for f, o, s in zip(full.mean.shape, out_shape, shape, strict=True)]
    return Moments(full.mean.repeat(times), full.var.repeat(times))


@rule(F.interpolate, nn.Upsample, nn.UpsamplingBilinear2d, standing="approximate",
      reason="exact for nearest; an interpolated value is quieter than its neighbours by an amount left out")  # fmt: skip
def interpolate(*args: Any, **kwargs: Any) -> Moments:
    """Values are repeated or mixed from close neighbours: the moments stay."""
    found: Moments = next(a for a in args if isinstance(a, Moments))
    dims = list(range(2, found.mean.dim()))
    return found if all(found.mean.shape[d] == 1 for d in dims) else found.pooled(dims)


@rule(torch.roll, "roll", torch.flip, "flip", shaped=True)
def roll(x: Moments, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """Elements change places along dimensions over which the moments are taken not to vary."""
    return x


def _plain(x: Any) -> bool:
    return x is None or x is Ellipsis or isinstance(x, int | slice)


@rule(operator.getitem, "__getitem__")
def getitem(x: Moments | Sequence[Moments], index: Any) -> Moments:
    """One of several outputs, or a slice: along a dimension over which the moments vary they are sliced too."""
    if not isinstance(x, Moments):
        return x[index]
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(_plain(e) for e in entries):
        raise NormPropError("an index that is a tensor has no moment rule; slices, integers, None and … have.")
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        missing = x.mean.dim() - sum(e is not None for e in entries) + 1
        entries[at : at + 1] = [slice(None)] * missing
    dim, adapted = 0, []
    for entry in entries:
        if entry is None:
            adapted.append(None)
            continue
        constant = x.mean.shape[dim] == 1
        adapted.append(entry if not constant else slice(None) if isinstance(entry, slice) else 0)
        dim += 1
    key = tuple(adapted)
    return Moments(x.mean[key], x.var[key])
