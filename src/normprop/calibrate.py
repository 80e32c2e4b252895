"""Constants (d, k) of each site: from a BatchNorm's running statistics, or measured on data in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from normprop import sites
from normprop.channel_moments import Moments
from normprop.converted import ConvertedModule, as_converted
from normprop.errors import NormPropError
from normprop.lane import lane_nodes, last_uses
from normprop.sites import Site

Statistics = tuple[Tensor, Tensor]


def calibrate(model: nn.Module, data: Any) -> nn.Module:
    """Set every site's constants from data, so that each site standardises what it really sees.

    One pass in the order of the graph: a site is measured behind sites that are calibrated already. With the measured mean
    and variance of the layer's output z, d = E z − E and k = Var z / V (METHOD §3); from there on the computed E and V
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
    if not any(n.target in (sites.effective_weight, sites.effective_affine) for n in converted.graph.nodes):
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
    model: ConvertedModule, statistics: Mapping[tuple[str, int], Statistics], biases: Mapping[str, Tensor | None]
) -> None:
    """Set every site's constants so that it standardises by given statistics: d = rm − E, k = (rv + ε)/V.

    A site that had no BatchNorm in its place gets γ = √V and β = E + b instead, so that it gives the layer's own output.

    Args:
        model: a converted network; changed in place.
        statistics: mean, and variance plus ε, of a layer's output without its bias, by path of the site and index of the
            call.
        biases: of the layers before sites that had no BatchNorm in their place, by path of the site.
    """
    for graph in dict.fromkeys(model.graphs().values()):
        _Calibration(model, graph, given=statistics, biases=biases).run()


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
    """Runs a converted graph node by node, the lane once and the data lane for every batch.

    Args:
        model: whose parameters are used and whose constants are set.
        graph: one of its graphs.
        given: statistics by path and call; then no data is needed and the data lane is not run.
        biases: bias of the layer, by path, for sites which shall give the layer's own output.
        batches: what to measure otherwise.
    """

    def __init__(
        self,
        model: ConvertedModule,
        graph: fx.Graph,
        *,
        given: Mapping[tuple[str, int], Statistics] | None = None,
        biases: Mapping[str, Tensor | None] | None = None,
        batches: Sequence[Tensor] = (),
    ) -> None:
        self.interpreter = fx.Interpreter(model, garbage_collect_values=False, graph=graph)
        self.graph = graph
        self.given = given
        self.biases = biases or {}
        self.batches = batches
        self.lane = lane_nodes(graph)
        self.values: dict[fx.Node, Any] = {}
        self.data: list[dict[fx.Node, Any]] = [{} for _ in batches]

    @torch.no_grad()
    def run(self) -> None:
        """Set the constants of every site of the graph."""
        frees = last_uses(self.graph)
        for node in self.graph.nodes:
            if node in self.lane:
                if node.target in (sites.effective_weight, sites.effective_affine):
                    self._set(node)
                self.values[node] = self._execute(node, self.values)
            else:
                for batch, values in zip(self.batches, self.data, strict=True):
                    both = {a: (self.values if a in self.lane else values)[a] for a in node.all_input_nodes}
                    values[node] = batch if node.op == "placeholder" and not node.args else self._execute(node, both)
            for values in self.data:
                for used in frees.get(node, ()):
                    values.pop(used, None)

    def _execute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op in ("output",):
            return None
        if node.op == "placeholder":
            return node.args[0]
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def _set(self, node: fx.Node) -> None:
        args: Any = fx.node.map_arg(node.args, self.values.__getitem__)
        options: dict[str, Any] = dict(node.kwargs)
        call = options.pop("call", 0)
        site_node: Any = node.args[0] if node.target is sites.effective_affine else node.args[1]
        site = self.values[site_node]
        if node.target is sites.effective_weight:
            weight, _, moments = args
            if options.pop("center", False):
                weight = sites.centred(weight, options.get("groups", 1), "transposed_stride" in options)
            mean, var = sites.statistics(weight, moments, **options)
        else:
            channels: Moments = args[1].channels(options["channel"])
            weight, (mean, var) = None, (channels.mean, channels.var)
        path = str(site_node.target)
        target: Statistics | None
        if path in self.biases:
            target = _own_output(site, self.biases[path], mean, var, first=call == 0)
        else:
            target = self._target((path, call), node, weight, options["channel"])
        if target is None:
            return
        shift, scale = (t[call] if t.dim() == 2 else t for t in (site.shift, site.scale))
        shift.copy_(target[0].to(mean.dtype) - mean)
        scale.copy_(target[1].to(var.dtype) / torch.where(var > 0, var, 1.0))

    def _target(self, key: tuple[str, int], node: fx.Node, weight: Tensor | None, channel: int) -> Statistics | None:
        """The statistics that a site should standardise by: given ones, or those of the raw layer's output."""
        if self.given is not None:
            return self.given.get(key)
        first = next(user for user in node.users if user.args[1] == 0)
        (consumer,) = first.users  # the layer, or the affine
        source: Any = consumer.args[0]
        layer: Any = consumer.target
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        for values in self.data:
            z: Tensor = values[source] if source in values else self.values[source]
            if weight is not None:
                known = {**self.values, **values}
                z = layer(z, weight.to(z.dtype), None, *fx.node.map_arg(tuple(consumer.args[3:]), known.__getitem__))
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
