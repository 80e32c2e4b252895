"""What is known of a network's inputs: standard normal, or as the user says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.graph.example_inputs import Shape


def input_moments(shapes: Sequence[Shape], given: Any, like: Tensor) -> list[Moments]:
    """Moments of each input of a network, checked and brought to the input's rank.

    Args:
        shapes: of a sample of each input.
        given: None (standard normal), `Moments`, an object with ``mean`` and ``var`` such as `InputStats`, or a sequence of
            these, one an input.
        like: a tensor with the dtype and device to use.

    Raises:
        NormPropError: a variance that is negative, zero or NaN, or a wrong number of channels.
    """
    several = list(given) if isinstance(given, tuple | list) else [given] + [None] * (len(shapes) - 1)
    if len(several) != len(shapes):
        raise NormPropError(f"the network has {len(shapes)} inputs, moments were given for {len(several)}.")
    return [_input(g, shape, like) for g, shape in zip(several, shapes, strict=True)]


def sample_shapes(given: Any) -> list[Shape | None] | None:
    """Shape of a sample of each input as far as given moments tell; None if they tell nothing."""
    several = given if isinstance(given, tuple | list) else [given]
    shapes = [_sample_shape(one) for one in several]
    return shapes if any(shape is not None for shape in shapes) else None


def _sample_shape(given: Any) -> Shape | None:
    shape = getattr(given, "shape", None)
    if shape:
        return tuple(shape)
    mean = getattr(given, "mean", None)
    if not isinstance(mean, Tensor) or mean.dim() < 2:
        return None
    full = tuple(mean.shape[1:]) if mean.shape[0] == 1 and mean.dim() > 2 else tuple(mean.shape)
    return full if any(size != 1 for size in full[1:]) else None


def _input(given: Any, shape: Shape, like: Tensor) -> Moments:
    rank = len(shape) + 1
    channel = 1
    channels = shape[0] if shape else 1
    if given is None and not shape:
        return Moments(like.new_zeros((1,) * rank), like.new_ones((1,) * rank))
    if given is None:
        return Moments(like.new_zeros(channels), like.new_ones(channels)).aligned(rank, channel)
    mean, var = (torch.as_tensor(t).to(like) for t in (given.mean, given.var))
    if tuple(mean.shape) == shape and mean.dim() > 1:
        found = Moments(mean.unsqueeze(0), var.unsqueeze(0))
    elif mean.dim() == rank and all(a in (1, b) for a, b in zip(mean.shape, (1, *shape), strict=True)):
        found = Moments(mean, var.expand(mean.shape))
    elif mean.numel() == 1:
        found = Moments(mean.reshape(1), var.reshape(1)).expanded((channels,)).aligned(rank, channel)
    elif mean.dim() == 1 and len(mean) == channels:
        found = Moments(mean, var).aligned(rank, channel)
    elif mean.dim() == 1 and len(mean) == shape[-1]:
        found = Moments(mean, var).aligned(rank, -1)
    else:
        raise NormPropError(
            f"input moments have shape {tuple(mean.shape)}, the network takes samples of shape {shape}.\n"
            f"Give one mean and variance a channel ({channels}), or an element."
        )
    bad = "NaN" if not bool(torch.isfinite(var).all() & torch.isfinite(mean).all()) else ""
    bad = bad or ("negative" if bool((var < 0).any()) else "zero" if bool((var == 0).all()) else "")
    if bad and like.device.type != "meta":
        raise NormPropError(
            f"the input's moments hold a {bad} variance or mean.\nStandardise the data, drop constant channels."
        )
    return found
