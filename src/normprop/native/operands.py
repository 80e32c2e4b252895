"""What the compiled functions can be given."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from normprop.native.library import library

_DTYPES = (torch.float32, torch.float64)
_KNOWN = {Tensor, nn.Parameter}
# Whether the library was found to be there; a traced graph can't look for it.
_READY = False


def prepare() -> None:
    """Build and load the library, if that can be done, so that traced graphs may use it too."""
    global _READY
    _READY = not isinstance(library(), str)


def is_traced() -> bool:
    """Whether operations are being written down or transformed, so that they had better be torch's own."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def is_native(first: Tensor | None) -> bool:
    """Whether there are compiled functions, a network's tensor is one for them, and operations are neither written down nor
    looked at."""
    return (
        first is not None
        and first.is_cpu
        and type(first) in _KNOWN
        and not is_traced()
        and torch._C._len_torch_dispatch_stack() == 0
        and not isinstance(library(), str)
    )


def handles(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether there are compiled functions and these tensors are ordinary memory of the CPU, all of the one dtype.

    Within a transform or where operations are recorded or looked at they are left to torch, whose operations show.
    """
    if dtype not in _DTYPES or is_traced() or torch._C._len_torch_dispatch_stack() or isinstance(library(), str):
        return False
    there = [t for t in tensors if t is not None]
    return {type(t) for t in there} <= _KNOWN and {t.dtype for t in there} <= {dtype} and {t.is_cpu for t in there} <= {True}


def is_unshared(gradient: Tensor) -> bool:
    """Whether nobody but the backward pass that received a gradient holds it, so that it may be written over."""
    count: int = gradient._use_count()  # type: ignore[attr-defined]  # torch has no types for it
    return count == 1


def handles_whole(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> bool:
    """The same where `torch.compile` traces a graph. An exported graph is to hold torch's own operations alone."""
    return (
        _READY
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and dtype in _DTYPES
        and all(t is None or (type(t) in _KNOWN and t.is_cpu and t.dtype == dtype) for t in tensors)
    )


def is_native_whole(root: nn.Module) -> bool:
    """The same of a network's parameters."""
    first = next(root.parameters(), None)
    return first is not None and handles_whole([first], torch.promote_types(first.dtype, torch.float32))
