"""Operations that move elements: every one acts on the moments as on the tensor itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    kind = type(x)
    target: list[int] = []
    for old, new in _groups(before, after):
        varies = any(shape[d] != 1 for d in old)
        if varies and 0 in old and any(before[d] != 1 for d in old[1:]) and len(old) > 1:
            pooled = Moments(mean, var).pooled(list(old))
            mean, var, varies, kind = pooled.mean, pooled.var, False, Moments
        if varies:
            full = [before[d] if d in old else mean.shape[d] for d in range(len(before))]
            mean, var = mean.expand(full), var.expand(full)
        target += [after[d] if varies else 1 for d in new]
    return kind(mean.reshape(target), var.reshape(target))


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


def regroup(x: Moments, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """Positions change places and dimensions: what is left is one distribution a channel, along the channel dimension.

    The channel dimension is the first after the batch whose size both shapes share there, else the last.
    """
    rank = len(out_shape)
    channel = 1 if len(in_shapes[0]) == rank and in_shapes[0][1] == out_shape[1] != out_shape[-1] else -1
    return x.channels(channel).aligned(rank, channel)


@rule(nn.Flatten, nn.Unflatten, shaped=True)
def reshape_module(module: nn.Module, x: Moments, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """Elements keep their moments (see `reshaped`)."""
    return reshaped(x, in_shapes[0], out_shape)


def _whole(x: Moments, dim: int, size: int) -> Moments:
    """The moments with their true size along one dimension."""
    shape = [max(a, b) for a, b in zip(x.mean.shape, x.var.shape, strict=True)]
    shape[dim] = size
    return x.expanded(shape)


def _varies(x: Moments, dims: Sequence[int]) -> bool:
    """Whether the moments differ along some of the dimensions."""
    return any(max(x.mean.shape[d], x.var.shape[d]) != 1 for d in dims)


@rule(F.pixel_shuffle, shaped=True)
def pixel_shuffle(x: Moments, upscale_factor: int, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """r² channels become the phases of one: the mixture of their moments per channel (definition).

    Where moments vary along positions, every position has its own.
    """
    if _varies(x, (-2, -1)):
        whole = x.expanded((*x.mean.shape[:-3], *in_shapes[0][-3:]))
        return whole.moved(lambda t: F.pixel_shuffle(t, upscale_factor))
    x = _whole(x, -3, in_shapes[0][-3])
    grouped = Moments(*(t.unflatten(-3, (-1, upscale_factor**2)) for t in (x.mean, x.var)))
    return grouped.pooled([-3], keepdim=False)


@rule(F.pixel_unshuffle, shaped=True)
def pixel_unshuffle(x: Moments, downscale_factor: int, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """Each phase of a channel becomes a channel of its own with the same moments, or with those of its positions."""
    if _varies(x, (-2, -1)):
        whole = x.expanded((*x.mean.shape[:-3], *in_shapes[0][-3:]))
        return whole.moved(lambda t: F.pixel_unshuffle(t, downscale_factor))
    x = _whole(x, -3, in_shapes[0][-3])
    return x.moved(lambda t: t.repeat_interleave(downscale_factor**2, -3))


@rule(F.channel_shuffle, torch.channel_shuffle, shaped=True)
def channel_shuffle(x: Moments, groups: int, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """Channels change places."""
    x = _whole(x, 1, in_shapes[0][1])
    return Moments(*(t.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2) for t in (x.mean, x.var)))


@rule(nn.PixelShuffle, shaped=True)
def pixel_shuffle_module(module: nn.PixelShuffle, x: Moments, **shapes: Any) -> Moments:
    """As `pixel_shuffle`."""
    return pixel_shuffle(x, module.upscale_factor, **shapes)


@rule(nn.PixelUnshuffle, shaped=True)
def pixel_unshuffle_module(module: nn.PixelUnshuffle, x: Moments, **shapes: Any) -> Moments:
    """As `pixel_unshuffle`."""
    return pixel_unshuffle(x, module.downscale_factor, **shapes)


@rule(nn.ChannelShuffle, shaped=True)
def channel_shuffle_module(module: nn.ChannelShuffle, x: Moments, **shapes: Any) -> Moments:
    """As `channel_shuffle`."""
    return channel_shuffle(x, module.groups, **shapes)


def move(method: str, x: Moments, *args: Any, **kwargs: Any) -> Moments:
    """Dimensions change places, or one of size 1 comes or goes: mean and variance follow."""
    return x.moved(lambda t: getattr(t, method)(*args, **kwargs))


_MOVES: dict[str, tuple[Callable[..., Any], ...]] = {
    "permute": (torch.permute,),
    "transpose": (torch.transpose,),
    "swapaxes": (torch.swapaxes,),
    "movedim": (torch.movedim,),
    "unsqueeze": (torch.unsqueeze,),
    "t": (torch.t,),
    "moveaxis": (torch.moveaxis,),
    "swapdims": (torch.swapdims,),
}
for _method, _functions in _MOVES.items():
    TABLE.add(_method, Rule(move, leading=(_method,)))
    if hasattr(Tensor, f"{_method}_"):
        TABLE.add(f"{_method}_", Rule(move, leading=(_method,)))
    for _function in _functions:
        TABLE.add(_function, Rule(move, leading=(_method,)))


@rule(torch.squeeze, "squeeze", "squeeze_", shaped=True)
def squeeze(x: Moments, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """Dimensions of size 1 go."""
    return reshaped(x, in_shapes[0], out_shape)


@rule(getattr)
def attribute(x: Any, name: str) -> Any:
    """``x.T``, ``x.mT``, ``x.H``, and the entries of torch's named results."""
    if name in ("T", "mT", "H", "mH"):
        return x.moved(lambda t: getattr(t, name))
    if name in ("data", "real") and isinstance(x, Moments):
        return x
    if name in ("values", "indices") and isinstance(x, tuple):
        return x[name == "indices"]
    raise NormPropError(f"the attribute {name} of an activation has no moment rule.")


def same(x: Moments, *_: Any, **__: Any) -> Moments:
    """The values stay as they are."""
    return x


def same_module(module: nn.Module, x: Moments) -> Moments:
    """The values stay as they are."""
    return x


# What is not a number, or not finite, has no moments: `nan_to_num` meets none.
for _key in ("contiguous", "clone", "to", "float", "type_as", "detach", "double", "half", "type", "bfloat16", "cpu",
             "requires_grad_", "nan_to_num", "nan_to_num_", torch.nan_to_num, torch.nan_to_num_,
             torch.clone, torch.detach, torch.as_tensor, torch.asarray):  # fmt: skip
    TABLE.add(_key, Rule(same))
TABLE.add(nn.Identity, Rule(same_module))


@rule("expand", "expand_as", torch.broadcast_to, "broadcast_to", shaped=True)
def expand(x: Moments, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """Repeated elements keep their moments; new leading dimensions have size 1."""
    extra = len(out_shape) - x.mean.dim()
    return x.moved(lambda t: t.reshape(*(1,) * extra, *t.shape))


@rule("repeat", torch.tile, shaped=True)
def repeat(x: Moments, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """Repeated elements keep their moments."""
    shape = (1,) * (len(out_shape) - x.mean.dim()) + tuple(in_shapes[0])
    full = x.moved(lambda t: t.reshape(*(1,) * (len(out_shape) - t.dim()), *t.shape))
    times = [1 if f == 1 else o // s for f, o, s in zip(full.mean.shape, out_shape, shape, strict=True)]
    return full.moved(lambda t: t.repeat(times))


@rule(F.interpolate, F.grid_sample, nn.Upsample, nn.UpsamplingBilinear2d, standing="approximate",
      reason="exact for nearest; an interpolated value is quieter than its neighbours by an amount left out")  # fmt: skip
def interpolate(*args: Any, **kwargs: Any) -> Moments:
    """Values are repeated or mixed from close neighbours: the moments stay."""
    found: Moments = next(a for a in args if isinstance(a, Moments))
    dims = list(range(2, found.mean.dim()))
    return found if all(found.mean.shape[d] == 1 for d in dims) else found.pooled(dims)


@rule(F.affine_grid, shaped=True, standing="approximate", reason="entries of a transform are taken as independent")
def affine_grid(
    theta: Moments, size: Shape, align_corners: bool | None = None, *, in_shapes: Sequence[Shape], out_shape: Shape
) -> Moments:
    """Places ``Σ_j θ_ij p_j`` for positions p: ``E = Σ m_ij p_j``, ``Var = Σ v_ij p_j²`` (independent entries)."""
    dims = len(out_shape) - 2
    corner = torch.eye(dims, dims + 1, dtype=theta.mean.dtype, device=theta.mean.device)
    grid = F.affine_grid(corner[None], [1, *size[1:]], align_corners=bool(align_corners))
    grid = F.pad(grid, (0, 1), value=1.0)
    full = theta.expanded((1, dims, dims + 1))
    turned: Callable[[Tensor], Tensor] = lambda t: t.mT.reshape(1, *(1,) * (dims - 1), dims + 1, dims)
    return Moments(grid @ turned(full.mean), grid.square() @ turned(full.var))


@rule(nn.UpsamplingNearest2d)
def nearest(module: nn.UpsamplingNearest2d, x: Moments) -> Moments:
    """Repeated elements keep their moments."""
    if not _varies(x, (-2, -1)):
        return x
    ratio = module.scale_factor
    return x.moved(module) if isinstance(ratio, int) or module.size is not None else x.pooled([2, 3])


@rule(torch.roll, "roll", shaped=True)
def roll(x: Moments, shifts: Any, dims: Any = (), *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """Elements change places along some dimensions; along all of them together, from sample to sample, without any."""
    if dims not in ((), None):
        return x.moved(lambda t: t.roll(shifts, dims))
    return x.expanded(in_shapes[0]).moved(lambda t: t.roll(shifts)).pooled([0]) if x.mean.numel() > 1 else x


@rule(torch.flip, "flip")
def flip(x: Moments, *dims: Any, **named: Any) -> Moments:
    """Elements change places along some dimensions."""
    return x.moved(lambda t: t.flip(*dims, **named))
