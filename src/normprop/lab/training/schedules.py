"""Learning-rate schedules: torch's schedulers, stepped after every training step."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LRScheduler, StepLR

Schedule = Literal["onecycle", "cosine", "halving", "constant"]

# Share of the run in which the one-cycle rate rises.
_WARM_UP = 0.25


def build_schedule(optimizer: Optimizer, schedule: Schedule, *, total_steps: int, halve_every: int) -> LRScheduler:
    """A scheduler that starts from the optimizer's rate as the highest one.

    Args:
        optimizer: The optimizer whose rate it sets, now and after every `step()`.
        schedule: `onecycle` rises linearly for a quarter of the run and falls as a cosine; `cosine` only falls; `halving`
            is that of Arpit et al. (2016); `constant` leaves the rate as it is.
        total_steps: Number of steps in the run.
        halve_every: Number of steps between two halvings.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=8.0)
        >>> schedule = build_schedule(optimizer, "halving", total_steps=8, halve_every=2)
        >>> [(optimizer.step(), schedule.get_last_lr()[0], schedule.step())[1] for _ in range(5)]
        [8.0, 8.0, 4.0, 4.0, 2.0]
    """
    if schedule == "constant":
        return ConstantLR(optimizer, factor=1.0)
    if schedule == "halving":
        return StepLR(optimizer, step_size=halve_every, gamma=0.5)
    warm_up = _WARM_UP if schedule == "onecycle" else 0.0

    # Not OneCycleLR or CosineAnnealingLR, which end at a rate of 0: the first step must move and the last one too, so both
    # ends are half a step outside.
    def factor(step: int) -> float:
        done = (step + 0.5) / max(1, total_steps)
        if done < warm_up:
            return done / warm_up
        return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))

    return LambdaLR(optimizer, factor)
