"""Tensors of a structure, and which of them share memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a structure."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensors_in(v)]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, slice):
        return tensors_in((value.start, value.stop, value.step))
    if pytree.tree_is_leaf(value):
        return []
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def sizes(value: Any) -> Any:
    """A value's sizes and kinds as they are now: a network may change those of its tensors in place."""
    with torch._C.DisableTorchFunction():
        return pytree.tree_map_only(Tensor, lambda t: t.detach() if t.is_meta else on_meta(t), value)


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same size and kind without values."""
    with torch._C.DisableTorchFunction():
        return torch.empty_like(tensor, device="meta")


def storage_of(tensor: Tensor) -> int:
    """What tells a tensor's memory from others."""
    try:
        with torch._C.DisableTorchFunction():
            return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return id(tensor)


def are_same_numbers(other: Tensor, changed: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order."""
    with torch._C.DisableTorchFunction():
        if (other.numel(), other.dtype, other.storage_offset()) != (
            changed.numel(),
            changed.dtype,
            changed.storage_offset(),
        ):
            return False
        alike = other.shape == changed.shape and other.stride() == changed.stride()
        return alike or (other.is_contiguous() and changed.is_contiguous())
