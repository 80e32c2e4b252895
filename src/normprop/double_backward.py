"""Gradients that can be differentiated again, for autograd functions whose own backward can't be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def gradients_again(
    compute: Callable[[Sequence[Any]], Sequence[Tensor | None]], inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """What a backward returns for its inputs, recorded in the graph.

    Inputs may be made of each other, and one of them may be there twice: what is differentiated are aliases of them, so that
    each gets its own share alone.

    Args:
        compute: the function, from inputs to outputs, in operations that autograd knows.
        inputs: tensors, or None; those that need no gradient get none.
        grads: one an output, None for zero.
    """
    aliases = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
    pairs = [(out, g) for out, g in zip(compute(aliases), grads, strict=True) if out is not None and g is not None]
    known = [(out, g) for out, g in pairs if out.requires_grad]
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad([out for out, _ in known], wanted, [g for _, g in known], create_graph=True, allow_unused=True)
    )
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
