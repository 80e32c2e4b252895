"""One look at a network: what its modules put out in one forward."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.graph.walk import Walk
from normprop.inspection.propagation import rows_of
from normprop.inspection.row import Row

Seen = tuple[Moments, int, Row]  # of a call: what was measured, of how many values a channel, and what was predicted

_ENOUGH = 32  # values of which a standard deviation can be told


class Look:
    """Hooks on modules for the time of one forward.

    Args:
        model: the network.
        rows: predicted rows of each module, one a call.
    """

    def __init__(self, model: nn.Module, rows: Mapping[str, Row]) -> None:
        self.rows = rows
        self.found: dict[str, Seen] = {}
        self.seconds = 0.0
        self.calls: dict[str, int] = {}
        paths = {path.partition(":")[0] for path in rows}
        self.handles = [model.get_submodule(path).register_forward_hook(self._hook(path)) for path in paths]

    def end(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def measure(_: nn.Module, __: Any, output: Any) -> None:
            began = time.perf_counter()
            call = self.calls[path] = self.calls.get(path, 0) + 1
            key = path if call == 1 else f"{path}:{call}"
            if key in self.rows and isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                row = self.rows[key]
                if (moments := _measured(output, row.predicted.mean.shape)) is not None:
                    self.found[key] = moments, output.numel() // moments.mean.numel(), row
            self.seconds += time.perf_counter() - began

        measure.unrecorded = True  # type: ignore[attr-defined]  # a converted layer runs as it does without it
        return measure


@torch.no_grad()
def _measured(output: Tensor, shape: torch.Size) -> Moments | None:
    """Moments of a tensor along the dimensions in which predictions are constant."""
    if output.dim() != len(shape):
        return None
    others = [d for d in range(output.dim()) if shape[d] == 1]
    if any(output.shape[d] != shape[d] for d in range(output.dim()) if d not in others):
        return None
    var, mean = torch.var_mean(output.detach().float(), others, correction=0, keepdim=True)
    return Moments(mean, var)


@torch.no_grad()
def drift_of(found: Moments, predicted: Moments, count: int) -> Tensor:
    """Octaves between measured and predicted standard deviation: rms over channels, or of all where each has few values.

    Args:
        found: measured, one value a channel.
        predicted: likewise.
        count: values that each channel was measured on.
    """
    mean, var = predicted.mean.to(found.mean), predicted.var.to(found.var)
    known = (var > 0) & (found.var > 0)
    if count >= _ENOUGH:
        return torch.where(known, (found.var / var).log2() / 2, torch.nan).square().nanmean().sqrt()
    if count * var.numel() < _ENOUGH:
        return var.new_full((), torch.nan)
    shares = (found.var + (found.mean - mean).square()) / var
    return (torch.where(var > 0, shares, torch.nan).nanmean().log2() / 2).abs()


def rows_by_path(walk: Walk, inputs: list[Moments]) -> dict[str, Row]:
    """Rows of modules that are run as a whole, one a call, by path and call."""
    found: dict[str, Row] = {}
    paths = {node.name: node.target for node in walk.nodes if node.op == "module"}
    calls: dict[str, int] = {}
    for row in rows_of(walk, inputs):
        path = paths.get(row.name)
        if path:
            calls[path] = calls.get(path, 0) + 1
            found[path if calls[path] == 1 else f"{path}:{calls[path]}"] = row
    return found
