"""Learning-rate schedules as pure functions of the step, so that there is no state to save."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["onecycle", "cosine", "halving", "constant"]

# Share of the run in which the one-cycle rate rises.
_WARM_UP = 0.25


def rate_factor(schedule: Schedule, step: int, *, total_steps: int, steps_per_epoch: int, halve_every: int) -> float:
    """What the highest learning rate is multiplied with at `step`, in (0, 1].

    `onecycle` rises linearly for a quarter of the run and falls as a cosine; `cosine` only falls; `halving` halves
    every `halve_every` epochs, the schedule of Arpit et al. 2016; `constant` is 1.

    Example:
        >>> [rate_factor("halving", s, total_steps=8, steps_per_epoch=2, halve_every=2) for s in (0, 3, 4, 7)]
        [1.0, 1.0, 0.5, 0.5]
    """
    if schedule == "constant":
        return 1.0
    if schedule == "halving":
        return 0.5 ** (step // (halve_every * steps_per_epoch))
    # The first step must move and the last one too: both ends are half a step outside.
    done = (step + 0.5) / total_steps
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if done < _WARM_UP:
        return done / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))
