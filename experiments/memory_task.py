"""One run of a task of long memory: Adam, a one-cycle rate, gradients clipped by their norm."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from normprop.lab.training.schedules import build_schedule


def trained(
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    look: Callable[[], float],
    *,
    rate: float,
    updates: int,
    looks: int,
    seed: int,
) -> tuple[list[float], float]:
    """What looks at equal distances gave, and the processor time of training.

    Args:
        model: what is trained.
        loss: of a batch that it draws.
        look: a number after so many updates.
        rate: the highest one.
        updates: steps of the optimizer.
        looks: how many.
        seed: of the batches.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = build_schedule(optimizer, "onecycle", total_steps=updates, halve_every=1)
    generator, found, seconds = torch.Generator().manual_seed(seed), [], 0.0
    for update in range(1, updates + 1):
        began = time.process_time()
        value = loss(generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - began
        if update % (updates // looks) == 0:
            found.append(look())
    return found, seconds
