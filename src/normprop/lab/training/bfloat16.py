"""Whether bfloat16 saves time."""

from __future__ import annotations

import torch


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16. A processor without converts every number, many times slower.

    Example:
        >>> computes_bfloat16(torch.device("cuda"))
        True
    """
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
