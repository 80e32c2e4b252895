"""What every tensor of a network should be, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.graph.input_moments import input_moments
from normprop.graph.trace import Leaf
from normprop.graph.walk import Walk, reference_tensor
from normprop.inspection.propagation import rows_of
from normprop.inspection.report import Report
from normprop.inspection.rewalk import walk_of
from normprop.rules.table import Key, Rule


def inspect(
    model: nn.Module,
    data: Any = None,
    *,
    input: Any = None,
    rules: Mapping[Key, Rule | Callable[..., Any]] | None = None,
    leaf_modules: Sequence[Leaf] = (),
) -> Report:
    """Predicted and, with data, measured moments of every tensor of a network, in eval mode.

    Args:
        model: a network that torch.fx can trace, or one that `convert` made. It is not changed.
        data: a tensor of samples, or an iterable of tensors or of tuples whose first entry is one. None predicts only.
        input: moments of the input, standard normal by default.
        rules: moment rules for this call.
        leaf_modules: modules, classes or paths that tracing must not enter.

    Returns:
        A `Report`; with data every row has ``measured``, per channel over samples and positions.

    Raises:
        UnsupportedOpError: operations without a moment rule, all of them named.
        TracingError: control flow on values.
        NormPropError: no data in `data`.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> report = normprop.inspect(net, torch.randn(500, 4))
        >>> report[-1].operation, report[-1].measured.var.shape
        ('ReLU', torch.Size([1, 8]))
    """
    training = model.training
    model.eval()
    try:
        shape = getattr(input, "shape", None) or _sample_shape(data)
        walk = walk_of(model, rules=rules, leaf_modules=leaf_modules, shape=tuple(shape) if shape else None)
        report = Report(rows_of(walk, input_moments(walk.shapes(), input, reference_tensor(model))), type(model).__name__)
        if data is None:
            return report
        return report.with_measured(_measure(walk, report, data, reference_tensor(model).device))
    finally:
        model.train(training)


def _sample_shape(data: Any) -> tuple[int, ...] | None:
    return tuple(data.shape[1:]) if isinstance(data, Tensor) else None


def _measure(walk: Walk, report: Report, data: Any, device: torch.device) -> dict[str, Moments]:
    """Moments of every tensor of the report over all batches, by node name."""
    meter = _Meter(walk, report)
    batches: Iterable[Any] = [data] if isinstance(data, Tensor) else data
    with torch.no_grad():
        for batch in batches:
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            meter.run(inputs.to(device))
    if not meter.counts:
        raise NormPropError("inspect got no data.")
    return meter.moments()


class _Meter(fx.Interpreter):
    """Runs the traced network and sums up every tensor per channel."""

    def __init__(self, walk: Walk, report: Report) -> None:
        super().__init__(walk.graph_module)
        self.predicted = {row.name: row.predicted for row in report}
        self.counts: dict[str, int] = {}
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A BatchNorm with an activation inside runs as its plain part: the rest of it has nodes of its own."""
        module = self.fetch_attr(target)
        if isinstance(module, _NormBase) and module.running_mean is not None and len(list(module.children())):
            return nn.functional.batch_norm(
                args[0], module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
            )
        return super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and add its tensor to the sums."""
        value = super().run_node(n)
        if (
            n.name in self.predicted
            and isinstance(value, Tensor)
            and (value.is_floating_point() or value.dtype == torch.bool)
        ):
            shape = self.predicted[n.name].mean.shape
            others = [d for d in range(value.dim()) if shape[d] == 1]
            wide = value if value.device.type == "mps" else value.double()
            total, square = wide.sum(others, keepdim=True), wide.square().sum(others, keepdim=True)
            before = self.sums.get(n.name)
            self.sums[n.name] = (total, square) if before is None else (before[0] + total, before[1] + square)
            self.counts[n.name] = self.counts.get(n.name, 0) + value.numel() // total.numel()
        return value

    def moments(self) -> dict[str, Moments]:
        """Mean and variance by node name."""
        found = {}
        for name, (total, square) in self.sums.items():
            mean = total / self.counts[name]
            found[name] = Moments(mean, (square / self.counts[name] - mean.square()).clamp(min=0.0))
        return found
