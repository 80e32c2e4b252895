"""Gradients that can be differentiated again, for autograd functions whose own backward can't be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradients_again(
    outputs: Sequence[Tensor | None], inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """What a backward returns for its inputs, recorded in the graph.

    Args:
        outputs: the function's, computed once more from `inputs` in operations that autograd knows.
        inputs: tensors, or None; those that need no gradient get none.
        grads: one an output, None for zero.
    """
    pairs = [(out, g) for out, g in zip(outputs, grads, strict=True) if out is not None and g is not None]
    known = [(out, g) for out, g in pairs if out.requires_grad]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad([out for out, _ in known], wanted, [g for _, g in known], create_graph=True, allow_unused=True)
    )
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
