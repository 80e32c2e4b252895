"""In what precision moments and effective weights are computed."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


def working_dtype(device: torch.device) -> torch.dtype:
    """The precision to compute moments in: float64, which Metal does not have, nor ONNX Runtime for every function."""
    narrow = device.type == "mps" or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())
    return torch.float32 if narrow else torch.float64


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which norms and moments of `dtype` parameters are computed: their own, but float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: moments of half-precision networks are not computed in half precision."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off on the tensor's device; the meta device knows no autocast."""
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def reference_tensor(model: nn.Module) -> Tensor:
    """A floating tensor whose device and (at least float32) dtype the moments of a model take."""
    tensor = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.zeros(()))
    return torch.empty(0, dtype=wide(tensor).dtype, device=tensor.device)
