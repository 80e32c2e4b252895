"""What every tensor of a network should be, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.graph.example_inputs import Inputs, batch_inputs, required
from normprop.graph.input_moments import input_moments, sample_shapes
from normprop.graph.preparation import argument_names, recorder_for
from normprop.graph.recorder import Leaf
from normprop.graph.walk import Walk
from normprop.inspection.histogram import Histogram
from normprop.inspection.propagation import rows_of
from normprop.inspection.report import Report
from normprop.inspection.rewalk import walk_of
from normprop.precision import reference_tensor
from normprop.rules.table import Key, Rule


def inspect(
    model: nn.Module,
    data: Any = None,
    *,
    input: Any = None,
    example: Any = None,
    rules: Mapping[Key, Rule | Callable[..., Any]] | None = None,
    leaf_modules: Sequence[Leaf] = (),
) -> Report:
    """Predicted and, with data, measured moments of every tensor of a network, in eval mode.

    Args:
        model: any network, also one that `convert` made. It is not changed.
        data: a tensor of samples, or an iterable of batches as for `calibrate`. None predicts only.
        input: moments of the input, standard normal by default.
        example: what the model's forward takes, see `convert`; by default what `data` begins with, or guessed.
        rules: moment rules for this call.
        leaf_modules: modules, classes or paths to keep whole.

    Returns:
        A `Report`; with data every row has ``measured``, per channel over samples and positions.

    Raises:
        UnsupportedOpError: operations without a moment rule, all of them named.
        TracingError: no input was found that the network runs on.
        NormPropError: no data in `data`.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> report = normprop.inspect(net, torch.randn(500, 4))
        >>> report[-1].operation, report[-1].measured.var.shape
        ('ReLU', torch.Size([1, 8]))
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        shape = sample_shapes(input) or _sample_shapes(data, model)
        walk = walk_of(model, rules=rules, leaf_modules=leaf_modules, shape=shape, example=example)
        report = Report(rows_of(walk, input_moments(walk.shapes(), input, reference_tensor(model))), type(model).__name__)
        return report if data is None else _measured(walk, report, data, rules, leaf_modules)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _sample_shapes(data: Any, model: nn.Module) -> Any:
    """Shapes of a sample of each input where data tell them: a tensor, or what can be looked into without using it up."""
    if isinstance(data, Tensor):
        return tuple(data.shape[1:])
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        return None
    with torch.random.fork_rng(devices=[]):  # a loader that shuffles draws
        first = next(iter(data), None)
    needed = required(model)
    if isinstance(first, Mapping):
        entries = [first.get(parameter.name) for parameter in needed]
    else:
        entries = list(first[: len(needed)]) if isinstance(first, tuple | list) else [first]
    return [tuple(t.shape[1:]) if isinstance(t, Tensor) else None for t in entries] if entries else None


@torch.no_grad()
def _measured(walk: Walk, report: Report, data: Any, rules: Any, leaf_modules: Sequence[Leaf]) -> Report:
    """The report with moments and histograms of every tensor over all batches."""
    batches = [data] if isinstance(data, Tensor | Inputs) else data
    if not isinstance(batches, Iterable):
        raise NormPropError(f"samples are measured, and {type(data).__name__} holds none.\nPass a tensor or a loader.")
    meter = _Meter(report)
    device = reference_tensor(walk.model).device
    for batch in batches:
        inputs = batch_inputs(batch, walk.example, walk.model).map(lambda t: t.to(device))
        recorder = recorder_for(walk.model, rules, leaf_modules, observer=meter.add)
        recorder.run(inputs.args, inputs.kwargs, argument_names(walk.model))
    if not meter.counts:
        raise NormPropError("inspect got no data.")
    return report.with_measured(meter.moments(), meter.histograms)


class _Meter:
    """Sums up every tensor per channel."""

    def __init__(self, report: Report) -> None:
        self.predicted = {row.name: row.predicted for row in report}
        self.counts: dict[str, int] = {}
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.histograms: dict[str, Histogram] = {}

    def add(self, name: str, value: Any) -> None:
        """Add an operation's tensor to the sums."""
        if name not in self.predicted or not isinstance(value, Tensor) or value.numel() == 0:
            return
        if value.is_complex() or not (value.is_floating_point() or value.dtype == torch.bool):
            return
        shape = self.predicted[name].mean.shape
        if len(shape) != value.dim():
            return
        others = [d for d in range(value.dim()) if shape[d] == 1]
        if name not in self.histograms and value.is_floating_point() and value.dim() > 1:
            self.histograms[name] = Histogram.of(value, others)
        wide = value if value.device.type == "mps" else value.double()
        total, square = wide.sum(others, keepdim=True), wide.square().sum(others, keepdim=True)
        before = self.sums.get(name)
        self.sums[name] = (total, square) if before is None else (before[0] + total, before[1] + square)
        self.counts[name] = self.counts.get(name, 0) + value.numel() // total.numel()

    def moments(self) -> dict[str, Moments]:
        """Mean and variance by name."""
        found = {}
        for name, (total, square) in self.sums.items():
            mean = total / self.counts[name]
            found[name] = Moments(mean, (square / self.counts[name] - mean.square()).clamp(min=0.0))
        return found
