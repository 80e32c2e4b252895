"""What no record of a network shall see, and what recording one shall leave as it was."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch.utils.checkpoint import CheckpointFunction

Function = TypeVar("Function", bound=Callable[..., Any])

# Recorders that run now.
ACTIVE: list[Any] = []


def unrecorded(function: Function) -> Function:
    """A function whose operations are no part of a network: no recorder sees them."""

    @functools.wraps(function)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        if not ACTIVE:
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return cast(Function, quiet)


@contextlib.contextmanager
def untouched(gradients: bool) -> Iterator[None]:
    """No warnings, checkpoints that only run what is in them, and random states as they were."""
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    own = CheckpointFunction.__dict__.get("apply")
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CheckpointFunction.apply = staticmethod(lambda function, _, *args: function(*args))
        try:
            yield
        finally:
            if own is None:
                del CheckpointFunction.apply
            else:
                CheckpointFunction.apply = own
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(drawn)
