"""Numbers that are the same everywhere, on every device that asks for them."""

import torch
from torch import Tensor

from normprop.native.operands import is_traced


class Constant:
    """A tensor with a copy for each dtype and device where it is needed: copying it every time would make a GPU wait.

    Args:
        tensor: on a CPU.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.copies = {(tensor.dtype, tensor.device): tensor}

    def like(self, other: Tensor) -> Tensor:
        """The tensor with another's dtype and device."""
        if is_traced() or torch._C._len_torch_dispatch_stack():  # which what is kept must not come from
            return self.tensor.to(other.device, other.dtype)
        key = other.dtype, other.device
        if key not in self.copies:
            with torch.inference_mode(False):
                self.copies[key] = self.tensor.to(other.device, other.dtype)
        return self.copies[key]
