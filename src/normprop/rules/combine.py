"""Tensors joined and taken apart: cat, stack, split, chunk, unbind, pad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.rules.table import rule

Shape = Sequence[int]


def _known(x: Moments | Tensor) -> Moments:
    """A parameter among activations is a constant: its own value, no variance; of size 1 where it was expanded."""
    if isinstance(x, Moments):
        return x
    for dim in range(x.dim()):
        if x.stride(dim) == 0:
            x = x.narrow(dim, 0, 1)
    return Moments(x, torch.zeros_like(x))


def _along(x: Moments, dim: int, size: int) -> Moments:
    shape = list(torch.broadcast_shapes(x.mean.shape, x.var.shape))
    shape[dim] = size
    return x.expanded(shape)


@rule(torch.zeros_like, "new_zeros", shaped=True)
def zeros(x: Moments, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """A constant 0 of the input's form."""
    return _constant(x, 0.0, out_shape)


@rule(torch.ones_like, "new_ones", shaped=True)
def ones(x: Moments, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """A constant 1 of the input's form."""
    return _constant(x, 1.0, out_shape)


@rule(torch.full_like, shaped=True)
def full_like(x: Moments, fill_value: float, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any) -> Moments:
    """A constant of the input's form."""
    return _constant(x, float(fill_value), out_shape)


@rule("new_full", shaped=True)
def new_full(
    x: Moments, size: Any, fill_value: float, *_: Any, in_shapes: Sequence[Shape], out_shape: Shape, **__: Any
) -> Moments:
    """A constant of the given size."""
    return _constant(x, float(fill_value), out_shape)


def _constant(x: Moments, value: float, shape: Shape) -> Moments:
    return Moments(x.mean.new_full((1,) * len(shape), value), x.mean.new_zeros((1,) * len(shape)))


@rule(torch.cat, torch.concat, torch.concatenate, shaped=True)
def cat(tensors: Sequence[Moments | Tensor], dim: int = 0, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """Each part keeps its moments; what varies along other dimensions is broadcast."""
    shapes = iter(in_shapes)
    parts = []
    for tensor in tensors:
        size = next(shapes)[dim] if isinstance(tensor, Moments) else tensor.shape[dim]
        parts.append(_along(_known(tensor), dim, size))
    rank = len(out_shape)
    common = [max(p.mean.shape[d] for p in parts) for d in range(rank)]
    parts = [p.expanded([p.mean.shape[d] if d == dim % rank else common[d] for d in range(rank)]) for p in parts]
    if dim % rank == 0:  # joined batches: a mixture
        return Moments(torch.cat([p.mean for p in parts]), torch.cat([p.var for p in parts])).pooled([0])
    return Moments(torch.cat([p.mean for p in parts], dim), torch.cat([p.var for p in parts], dim))


@rule(torch.stack, shaped=True)
def stack(tensors: Sequence[Moments], dim: int = 0, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """A new dimension along which each part keeps its moments."""
    rank = len(out_shape) - 1
    common = [max(t.mean.shape[d] for t in tensors) for d in range(rank)]
    parts = [t.expanded(common) for t in tensors]
    return Moments(torch.stack([p.mean for p in parts], dim), torch.stack([p.var for p in parts], dim))


def pieces(
    method: str, x: Moments, argument: Any, dim: int = 0, *, in_shapes: Sequence[Shape], out_shape: Shape | None
) -> tuple[Moments, ...]:
    """split and chunk: each piece has the moments of its own channels."""
    x = _along(x, dim, in_shapes[0][dim])
    means, variances = getattr(x.mean, method)(argument, dim), getattr(x.var, method)(argument, dim)
    return tuple(Moments(m, v) for m, v in zip(means, variances, strict=True))


@rule(torch.split, "split", shaped=True)
def split(
    x: Moments, split_size_or_sections: Any = None, dim: int = 0, *, split_size: Any = None, in_shapes: Sequence[Shape],
    out_shape: Shape | None,
) -> tuple[Moments, ...]:  # fmt: skip
    """Each piece has the moments of its own channels."""
    size = split_size if split_size_or_sections is None else split_size_or_sections
    return pieces("split", x, size, dim, in_shapes=in_shapes, out_shape=out_shape)


@rule(torch.chunk, "chunk", shaped=True)
def chunk(
    x: Moments, chunks: int, dim: int = 0, *, in_shapes: Sequence[Shape], out_shape: Shape | None
) -> tuple[Moments, ...]:
    """Each piece has the moments of its own channels."""
    return pieces("chunk", x, chunks, dim, in_shapes=in_shapes, out_shape=out_shape)


@rule(torch.unbind, "unbind", shaped=True)
def unbind(x: Moments, dim: int = 0, *, in_shapes: Sequence[Shape], out_shape: Shape | None) -> tuple[Moments, ...]:
    """One piece an index; the dimension goes."""
    x = _along(x, dim, in_shapes[0][dim])
    return tuple(Moments(m, v) for m, v in zip(x.mean.unbind(dim), x.var.unbind(dim), strict=True))


@rule(F.pad, shaped=True)
def pad(
    x: Moments, pad: Sequence[int], mode: str = "constant", value: float | None = None, *, in_shapes: Sequence[Shape],
    out_shape: Shape,
) -> Moments:  # fmt: skip
    """Constant padding is a mixture with the constant, along channels constant new channels; other modes repeat values,
    with the moments that these have.

    With the share s of old positions: ``E = s m + (1−s) c``, ``E x² = s (v + m²) + (1−s) c²`` (definition; pooled over
    positions, where the extent is that of the example).
    """
    if mode != "constant":
        return _repeated(x, pad, in_shapes[0], lambda t: F.pad(t, list(pad), mode=mode))
    constant = float(value or 0.0)
    rank, share = len(in_shapes[0]), 1.0
    mean, var = torch.broadcast_tensors(x.mean, x.var)
    for k in range(len(pad) // 2):
        dim, (before, after) = rank - 1 - k, pad[2 * k : 2 * k + 2]
        if mean.shape[dim] == 1 and in_shapes[0][dim] != 1:
            share *= 1.0 - (max(before, 0) + max(after, 0)) / out_shape[dim]  # a negative width crops
        elif before or after:
            widths = [0] * (2 * k) + [before, after]
            mean, var = F.pad(mean, widths, value=constant), F.pad(var, widths)
    if share == 1.0:
        return Moments(mean, var)
    mixed = share * mean + (1.0 - share) * constant
    return Moments(mixed, share * (var + mean.square()) + (1.0 - share) * constant**2 - mixed.square())


@rule(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, shaped=True)
def constant_pad_module(module: nn.ConstantPad2d, x: Moments, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """As `pad` with mode "constant"."""
    widths = module.padding
    value = float(getattr(module, "value", 0.0))
    return pad(x, widths, "constant", value, in_shapes=in_shapes, out_shape=out_shape)


def _repeated(x: Moments, widths: Sequence[int], shape: Shape, pad: Callable[[Tensor], Tensor]) -> Moments:
    """Values at the borders are repeated, and their moments with them where these vary."""
    padded = range(len(shape) - len(widths) // 2, len(shape))
    full = [max(x.mean.shape[d], x.var.shape[d]) for d in range(len(shape))]
    if all(full[d] == 1 for d in padded):
        return x
    full = [shape[d] if d in padded else size for d, size in enumerate(full)]
    return x.expanded(full).moved(pad)


@rule(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d,
      nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, shaped=True)  # fmt: skip
def repeating_pad_module(module: nn.Module, x: Moments, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """As `pad` with another mode than "constant"."""
    widths: Any = module.padding
    return _repeated(x, widths, in_shapes[0], module)
