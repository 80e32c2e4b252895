"""Whether bfloat16 saves time."""

from __future__ import annotations

import torch


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; a processor without converts every number, and takes many times longer.

    Example:
        >>> computes_bfloat16(torch.device("cuda"))
        True
    """
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
