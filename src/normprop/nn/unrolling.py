"""The loop over time, in operations that autograd, `torch.func` and `torch.compile` know."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normprop.nn.recurrent_block import Block

Step = Callable[[Tensor, tuple[Tensor, ...], Block], tuple[Tensor, ...]]


def unroll(
    step: Step,
    drives: Sequence[Tensor],
    state: tuple[Tensor, ...],
    block: Block,
    *,
    reverse: bool = False,
    keep: float = 0.0,
    training: bool = False,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The first part of the state at all times, and the last state of every sequence.

    Args:
        step: One step in time.
        drives: What the input contributes, one tensor a time; its rows are sequences, longest first, which may end early.
        state: That before the first time, of all sequences.
        block: The layer.
        reverse: Whether time runs from the end of every sequence to its start.
        keep: The probability with which an element of the state stays as it was: zoneout (Krueger et al., 2017).
        training: Whether that is random; otherwise each element is the mean of both.
    """
    times = range(len(drives))
    outputs: list[Tensor] = []
    ended: list[tuple[Tensor, ...]] = []
    initial = state
    for time in reversed(times) if reverse else times:
        drive = drives[time]
        count = drive.shape[0]
        if not outputs:
            state = tuple(part[:count] for part in initial)
        before = state[0].shape[0]
        if count < before:
            ended.append(tuple(part[count:] for part in state))
            state = tuple(part[:count] for part in state)
        elif count > before:
            pairs = zip(state, initial, strict=True)
            state = tuple(torch.cat([part, begin[before:count]]) for part, begin in pairs)
        new = step(drive, state, block)
        state = zoneout(state, new, keep, training=training) if keep else new
        outputs.append(state[0])
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return outputs[::-1] if reverse else outputs, state


def zoneout(old: tuple[Tensor, ...], new: tuple[Tensor, ...], keep: float, *, training: bool) -> tuple[Tensor, ...]:
    """Every element old with probability `keep`, new otherwise; outside of training the mean of both.

    >>> zoneout((torch.zeros(2),), (torch.ones(2),), 0.25, training=False)
    (tensor([0.7500, 0.7500]),)
    """
    # Under autocast the first state may be wider than what comes of it.
    pairs = [(a.to(b.dtype), b) for a, b in zip(old, new, strict=True)]
    if not training:
        return tuple(torch.lerp(b, a, keep) for a, b in pairs)
    return tuple(torch.where(torch.rand_like(b) < keep, a, b) for a, b in pairs)
