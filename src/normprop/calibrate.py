"""Constants (d, k) of each site: from a BatchNorm's running statistics, or measured on data in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from normprop.converted import as_converted
from normprop.errors import NormPropError
from normprop.lane import LaneValues, last_uses, site_calls
from normprop.scale import Scale
from normprop.sites import Site, site_statistics

Statistics = tuple[Tensor, Tensor]


def calibrate(model: nn.Module, data: Any) -> nn.Module:
    """Set every site's constants from data, so that each site standardises what it really sees.

    One pass in the order of the graph: a site is measured behind sites that are calibrated already. With the measured mean
    and variance of the layer's output z, d = (E z − E)/√V and k = Var z / V (METHOD §3); from there on the computed E and V
    follow the parameters, as without calibration.

    Args:
        model: a network that `convert` made; its constants are changed in place, nothing else is.
        data: a tensor of samples ``(N, …)``, or an iterable of tensors or of tuples whose first entry is one (a
            DataLoader). All batches are carried through the network together: a few hundred samples are enough.

    Returns:
        The model.

    Raises:
        NormPropError: the model is not a converted one; no data; values that are not finite.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> x = 3 * torch.randn(256, 4) + 1
        >>> y = normprop.calibrate(normprop.convert(net), x)(x)
        >>> bool((y.mean(0).abs() < 1e-4).all() and (y.var(0) - 1).abs().max() < 0.01)
        True
    """
    converted = as_converted(model, "calibrate")
    if not converted.meta["normprop"]["calibrates"]:
        raise NormPropError("the paper's form has no constants to calibrate.\nConvert with method='exact'.")
    batches = _batches(data, next(converted.parameters()).device)
    mode = converted.training
    converted.eval()
    try:
        for graph in dict.fromkeys(converted.graphs().values()):
            _Calibration(converted, graph, batches=batches).run()
    finally:
        converted.train(mode)
    return model


def preserve_(
    root: nn.Module,
    graphs: Iterable[fx.Graph],
    statistics: Mapping[tuple[str, int], Statistics],
    biases: Mapping[str, Tensor | None],
) -> None:
    """Set every site's constants so that it standardises by given statistics: d = (rm − E)/√V, k = (rv + ε)/V.

    A site that had no BatchNorm in its place gets γ = √V and β = E + b instead, so that it gives the layer's own output.

    Args:
        root: the modules and parameters of a converted network; changed in place.
        graphs: its graphs, as they are before `batched`: where a site changes γ and β, later moments follow.
        statistics: mean, and variance plus ε, of a layer's output without its bias, by path of the site and index of the
            call.
        biases: of the layers before sites that had no BatchNorm in their place, by path of the site.
    """
    for graph in dict.fromkeys(graphs):
        _Calibration(root, graph, given=statistics, biases=biases).run()


def _batches(data: Any, device: torch.device) -> list[Tensor]:
    if isinstance(data, Tensor):
        data = [data]
    if not isinstance(data, Iterable):
        raise NormPropError(f"calibrate measures samples, and {type(data).__name__} holds none.\nPass a tensor or a loader.")
    batches = [b[0] if isinstance(b, tuple | list) else b for b in data]
    if not batches or any(b.numel() == 0 for b in batches):
        raise NormPropError("calibrate got no data.")
    if not all(bool(torch.isfinite(b).all()) for b in batches):
        raise NormPropError("the data to calibrate on holds values that are not finite.")
    return [b.to(device) for b in batches]


class _Calibration:
    """Runs a converted graph node by node, the lane once, as far as each site needs it, and the data lane for every batch.

    Args:
        root: whose parameters are used and whose constants are set.
        graph: a converted graph of it.
        given: statistics by path and call; then no data is needed and the data lane is not run.
        biases: bias of the layer, by path, for sites which shall give the layer's own output.
        batches: what to measure otherwise.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        *,
        given: Mapping[tuple[str, int], Statistics] | None = None,
        biases: Mapping[str, Tensor | None] | None = None,
        batches: Sequence[Tensor] = (),
    ) -> None:
        self.graph = graph
        self.given = given
        self.biases = biases or {}
        self.batches = batches
        self.lane = LaneValues(root, graph)
        self.calls = site_calls(graph)
        self.data: list[dict[fx.Node, Any]] = [{} for _ in batches]

    @torch.no_grad()
    def run(self) -> None:
        """Set the constants of every site of the graph."""
        frees = last_uses(self.graph)
        for node in self.graph.nodes:
            if node in self.lane.nodes:
                continue
            if node in self.calls:
                self._set(node)
                self.lane.known[node.args[1]] = self.lane.scale(self.calls[node])
            for batch, values in zip(self.batches, self.data, strict=True):
                values[node] = self._execute(node, values, batch)
                for used in frees.get(node, ()):
                    values.pop(used, None)

    def _execute(self, node: fx.Node, values: Mapping[fx.Node, Any], batch: Tensor) -> Any:
        if node.op == "output":
            return None
        if node.op == "placeholder":
            return node.args[0] if node.args else batch
        return self.lane.run(node, lambda a: self.lane[a] if a in self.lane.nodes else values[a])

    def _set(self, node: fx.Node) -> None:
        call = self.calls[node]
        site, index = self.lane[call.site], call.options.get("call", 0)
        filters, mean, var = site_statistics(self.lane.arguments(call))
        target: Statistics | None
        if call.path in self.biases:
            target = _own_output(site, self.biases[call.path], mean, var, first=index == 0)
        elif self.given is not None:
            target = self.given.get((call.path, index))
        else:
            plain = None if filters is None else Scale(filters, torch.ones_like(mean), torch.zeros_like(mean))
            target = self._measure(node, plain)
        if target is None:
            return
        shift, scale = (t[index] if t.dim() == 2 else t for t in (site.shift, site.scale))
        var = torch.where(var > 0, var, 1.0)
        shift.copy_((target[0].to(mean.dtype) - mean) / var.sqrt())
        scale.copy_(target[1].to(var.dtype) / var)

    def _measure(self, node: fx.Node, plain: Scale | None) -> Statistics:
        """Mean and variance, per channel, of what the site standardises: its layer's output without a bias, or its input."""
        channel = self.calls[node].options["channel"]
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        for values in self.data:
            fetch = lambda a, known=values: self.lane[a] if a in self.lane.nodes else known[a]
            found: Any = fx.node.map_arg((node.args[0], node.args[2:]), fetch)
            z, rest = found
            if plain is not None:
                z = node.target(z, plain, *rest)  # type: ignore[operator]  # one of the layers
            z = z if z.device.type == "mps" else z.double()
            others = [d for d in range(z.dim()) if d != channel % z.dim()]
            total, square = total + z.sum(others), square + z.square().sum(others)
            count += z.numel() // z.shape[channel]
        if count < 2:
            raise NormPropError("calibrate cannot measure a variance from one value a channel.\nPass more samples.")
        mean = total / count
        return mean, (square / count - mean.square()).clamp(min=1e-12)


def _own_output(site: Site, bias: Tensor | None, mean: Tensor, var: Tensor, *, first: bool) -> Statistics:
    """Statistics with which ``γ (z − mean)/√var + β`` is ``z + b``; the site's first call sets γ and β."""
    assert site.weight is not None
    assert site.bias is not None
    offset = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    if first:
        site.weight.copy_(torch.where(var > 0, var, 1.0).sqrt())
        site.bias.copy_(mean + offset)
    return site.bias - offset, site.weight.square()
