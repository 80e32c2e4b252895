"""What the compiled functions can be given."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from normprop.native.library import library

_DTYPES = (torch.float32, torch.float64)
_KNOWN = (Tensor, nn.Parameter)


def handles(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether there are compiled functions and these tensors are ordinary memory of the CPU, all of the one dtype.

    Not within a transform or a compilation, and where somebody looks at operations, these are left to torch.
    """
    return (
        dtype in _DTYPES
        and all(t is None or (type(t) in _KNOWN and t.is_cpu and t.dtype is dtype) for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not isinstance(library(), str)
    )
