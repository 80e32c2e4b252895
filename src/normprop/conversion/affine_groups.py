"""Parameter groups of γ and β."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from normprop.conversion.lane import Lane
from normprop.conversion.recalibration import affines_of
from normprop.errors import NormPropError


def part_affines(lane: Lane, optimizers: Sequence[Optimizer]) -> None:
    """Move γ and β to parameter groups that don't decay.

    Args:
        lane: of the network.
        optimizers: that train it.

    Raises:
        NormPropError: a scheduler has been made for one of them.
    """
    mine = {id(p) for pair in affines_of(lane) for p in pair}
    for one in optimizers:
        for group in list(one.param_groups):
            moved = [p for p in group["params"] if id(p) in mine]
            if not moved or not group.get("weight_decay"):
                continue
            if "initial_lr" in group:
                raise NormPropError(
                    "a scheduler knows the optimizer's groups already.\nCall keep_calibrated before the scheduler is made."
                )
            group["params"] = [p for p in group["params"] if id(p) not in mine]
            others = {key: value for key, value in group.items() if key != "params"}
            one.add_param_group({**others, "params": moved, "weight_decay": 0.0})
