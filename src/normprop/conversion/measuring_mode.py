"""A network while it is measured: in evaluation mode, uncompiled, and afterwards as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without what `Module.compile` made: each measurement would be compiled anew.

    Args:
        model: the network.
    """
    modes = {module: module.training for module in model.modules()}
    compiled = {module: call for module in modes if (call := module._compiled_call_impl) is not None}
    try:
        model.eval()
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, call in compiled.items():
            module._compiled_call_impl = call


def take_paths_of_training(model: nn.Module) -> None:
    """Training mode without its noise: of what has children alone."""
    for module in model.modules():
        module.training = next(module.children(), None) is not None
