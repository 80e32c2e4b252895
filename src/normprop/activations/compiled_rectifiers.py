"""Mean and variance behind leaky rectifiers of several tensors by compiled arithmetic, as one autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normprop.activations.rectifier_moments import rectified_moments
from normprop.double_backward import gradients_again
from normprop.native.library import library


def native_rectified(means: Sequence[Tensor], variances: Sequence[Tensor], slope: float) -> list[tuple[Tensor, Tensor]]:
    """What `rectified_moments` gives for each pair of contiguous tensors of one shape, for operands that are handled.

    Args:
        means: of Gaussians.
        variances: theirs.
        slope: of the rectifier below zero.
    """
    flat = _NativeRectified.apply(slope, len(means), *means, *variances)
    return list(zip(flat[: len(means)], flat[len(means) :], strict=True))


class _NativeRectified(torch.autograd.Function):
    """`LeakyRectifierMoments` of several tensors. Differentiated again, the backward is that of `rectified_moments`."""

    @staticmethod
    def forward(ctx: Any, slope: float, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.slope, ctx.count = slope, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        outputs = [torch.empty_like(t) for t in tensors]
        _run(
            slope,
            tensors[0].dtype,
            [(m, v, e, w, None, None, None, None) for m, v, e, w in _columns(count, tensors, outputs)],
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, slope, count = ctx.saved_tensors, ctx.slope, ctx.count
        if torch.is_grad_enabled():
            return (None, None, *gradients_again(lambda given: _plain(slope, count, given), tensors, grads))
        given = [g if g is None else g.contiguous() for g in grads]
        found = [torch.empty_like(t) for t in tensors]
        columns = zip(_columns(count, tensors, found), _columns(count, given), strict=True)
        _run(slope, tensors[0].dtype, [(m, v, None, None, g, h, a, b) for (m, v, a, b), (g, h) in columns])
        return (None, None, *found)


def _plain(slope: float, count: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Means, then variances, in torch's operations."""
    pairs = [rectified_moments(m, v, slope) for m, v in _columns(count, tensors)]
    return [mean for mean, _ in pairs] + [var for _, var in pairs]


def _columns(count: int, *lists: Sequence[Any]) -> Any:
    """From lists that hold what belongs to the means and then what belongs to the variances, both of each tensor."""
    return zip(*(part for both in lists for part in (both[:count], both[count:])), strict=True)


def _run(slope: float, dtype: torch.dtype, tensors: Sequence[Sequence[Tensor | None]]) -> None:
    native = library()
    assert not isinstance(native, str)
    fields: list[int] = []
    for mean, *others in tensors:
        assert mean is not None
        fields += (mean.data_ptr(), *(0 if t is None else t.data_ptr() for t in others), mean.numel())
    native.rectifiers(dtype, fields, len(tensors), slope)
