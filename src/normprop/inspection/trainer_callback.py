"""A probe as a callback of Hugging Face's Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from normprop.errors import NormPropError

if TYPE_CHECKING:
    from normprop.inspection.moment_probe import MomentProbe


def callback_for(probe: MomentProbe) -> Any:
    """A ``TrainerCallback`` that gives the probe the trainer's steps, and the trainer's log the probe's numbers.

    Args:
        probe: attached to the model that the trainer trains.

    Raises:
        NormPropError: transformers is not installed.
    """
    try:
        base = importlib.import_module("transformers").TrainerCallback
    except ModuleNotFoundError as error:
        raise NormPropError("this needs transformers.\nInstall it with pip install transformers.") from error

    def on_step_begin(_: Any, __: Any, state: Any, ___: Any, **____: Any) -> None:
        probe.step = state.global_step

    def on_log(_: Any, __: Any, state: Any, ___: Any, logs: Any = None, **____: Any) -> None:
        numbers = {key: value for key, value in probe.latest.items() if key != "step"}
        for log in (logs, *state.log_history[-1:]):
            if log is not None:
                log.update(numbers)

    return type("MomentProbeCallback", (base,), {"on_step_begin": on_step_begin, "on_log": on_log})()
