"""Constants (d, k, U) of each site: from a BatchNorm's running statistics, or measured on data in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from normprop.conversion.converted import as_converted
from normprop.conversion.lane import LaneValues, SiteCall, last_uses, site_calls
from normprop.errors import NormPropError, NotFiniteError
from normprop.rules.linear import full_precision
from normprop.sites.directions import principal_directions
from normprop.sites.reference import Scale, plain_scale
from normprop.sites.site import Site, site_operands, site_statistics

Statistics = tuple[Tensor, Tensor]


def calibrate(
    model: nn.Module, data: Any, *, directions: int = 8, shrinkage: float = 0.0, preserve: bool = False
) -> nn.Module:
    """Set every site's constants from data, so that each site standardises what it really sees.

    One pass in the order of the graph: a site is measured behind sites that are calibrated already. With the measured mean
    and variance of the layer's output z, d = (E z − E)/√V and k = Var z / V (METHOD §3); from there on the computed E and V
    follow the parameters, as without calibration.

    V takes the numbers in a filter's window for independent, and images are not: neighbouring pixels and channels vary
    together, and filters that add them up have many times the variance V has for them. So the `directions` U_r along which
    a layer's input varies most are measured first, and V = Σ c² v + Σ_r (Σ c √v U_r)² from there on, also while filters turn
    towards them. This is what lets a network train at BatchNorm's learning rates without clipping. With clipped gradients it
    learns better with a covariance that is shrunk towards independence (docs/results.md).

    Args:
        model: a network that `convert` made; its constants are changed in place, and with `preserve` γ and β.
        data: a tensor of samples ``(N, …)``, or an iterable of tensors or of tuples whose first entry is one (a
            DataLoader). All batches are carried through the network together: a few hundred samples are enough.
        directions: how many to measure in front of each layer (of transposed convolutions none); 0 for independence. Each
            costs as many operations a step as one more output position of every layer.
        shrinkage: α in [0, 1], by which their covariance is shrunk: V counts (1 − α) of what they add. At 1 they add
            nothing.
        preserve: change γ and β with the constants, so that the network computes what it did before. (Those of a site that
            is used several times follow its first call; the others, and sites without γ and β, keep their function by
            their constants, and don't standardise.)

    Returns:
        The model.

    Raises:
        NormPropError: the model is not a converted one; no data; `directions` below 0, or `shrinkage` outside
            [0, 1].
        NotFiniteError: values that are not finite, of the data or in the network.

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
    if directions < 0:
        raise NormPropError(f"directions is {directions}.\nUse 0 or more.")
    if not 0 <= shrinkage <= 1:
        raise NormPropError(f"shrinkage is {shrinkage}.\nUse a number from 0 to 1.")
    batches = samples(data, next(converted.parameters()).device)
    mode = converted.training
    converted.eval()
    try:
        for graph in dict.fromkeys(converted.graphs().values()):
            calibration = _Calibration(
                converted,
                graph,
                batches=batches,
                directions=directions if shrinkage < 1 else 0,
                shrinkage=shrinkage,
                keep=preserve,
            )
            calibration.run()
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


def samples(data: Any, device: torch.device) -> list[Tensor]:
    """The batches of a tensor or loader, checked, on a device; of a loader the first entry of each.

    Raises:
        NormPropError: no samples.
        NotFiniteError: values that are not finite.
    """
    if isinstance(data, Tensor):
        data = [data]
    if not isinstance(data, Iterable):
        raise NormPropError(f"samples are measured, and {type(data).__name__} holds none.\nPass a tensor or a loader.")
    batches = [b[0] if isinstance(b, tuple | list) else b for b in data]
    if not batches or any(b.numel() == 0 for b in batches):
        raise NormPropError("there is no data to measure.")
    if not all(bool(torch.isfinite(b).all()) for b in batches):
        raise NotFiniteError("the data to measure holds values that are not finite.")
    return [b.to(device) for b in batches]


class _Calibration:
    """Runs a converted graph node by node, the lane once, as far as each site needs it, and the data lane for every batch.

    Args:
        root: whose parameters are used and whose constants are set.
        graph: a converted graph of it.
        given: statistics by path and call; then no data is needed and the data lane is not run.
        biases: bias of the layer, by path, for sites which shall give the layer's own output.
        batches: what to measure otherwise.
        directions: how many to measure of each layer's input.
        shrinkage: of their covariance.
        keep: whether the function stays.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        *,
        given: Mapping[tuple[str, int], Statistics] | None = None,
        biases: Mapping[str, Tensor | None] | None = None,
        batches: Sequence[Tensor] = (),
        directions: int = 0,
        shrinkage: float = 0.0,
        keep: bool = False,
    ) -> None:
        self.graph = graph
        self.given = given
        self.biases = biases or {}
        self.batches = batches
        self.directions = directions
        self.shrinkage = shrinkage
        self.lane = LaneValues(root, graph)
        self.calls = site_calls(graph)
        self.data: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self.kept = _functions(LaneValues(root, graph), self.calls) if keep else {}

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
        if self.batches:
            self._set_directions(node, site, index)
        filters, mean, var = site_statistics(self.lane.arguments(call))
        target: Statistics | None
        if call.path in self.biases:
            target = _own_output(site, self.biases[call.path], mean, var, first=index == 0)
        elif self.given is not None:
            target = self.given.get((call.path, index))
        else:
            target = self._measure(node, filters, len(mean))
        if target is None:
            return
        if node in self.kept:
            target = _keep(site, *self.kept[node], target, first=index == 0)
            self.lane.forget(call.site)
        shift, scale = (t[index] if t.dim() == 2 else t for t in (site.shift, site.scale))
        var = torch.where(var > 0, var, 1.0)
        shift.copy_((target[0].to(mean.dtype) - mean) / var.sqrt())
        scale.copy_(target[1].to(var.dtype) / var)

    def _set_directions(self, node: fx.Node, site: Site, index: int) -> None:
        """Measure those of the input of the layer before a site."""
        form, given = site_operands(self.lane.arguments(self.calls[node]))
        found = None
        if given.weight is not None and not form.transposed and self.directions:
            layer = lambda filters, batch: self._output(node, batch, filters, len(filters))
            with full_precision(given.shift):
                found = principal_directions(
                    layer, len(self.batches), form, given, self.directions, shrinkage=self.shrinkage
                )
        if found is None:
            site.directions = None
            return
        several = site.shift.dim() == 2
        shape = (len(site.shift), *found.shape) if several else found.shape
        if site.directions is None or site.directions.shape != shape:
            site.directions = nn.Parameter(found.new_zeros(shape), requires_grad=False)
        (site.directions[index] if several else site.directions).copy_(found)

    def _output(self, node: fx.Node, batch: int, filters: Tensor | None, channels: int) -> Tensor:
        """What the layer before a site gives for some filters, without a bias; the site's input if there is no layer."""
        known = self.data[batch]
        found: Any = fx.node.map_arg(
            (node.args[0], node.args[2:]), lambda a: self.lane[a] if a in self.lane.nodes else known[a]
        )
        x, rest = found
        layer: Any = node.target
        output: Tensor = x if filters is None else layer(x, Scale(filters, None, filters.new_zeros(channels)), *rest)
        return output

    def _measure(self, node: fx.Node, filters: Tensor | None, channels: int) -> Statistics:
        """Mean and variance, per channel, of what the site standardises: its layer's output without a bias, or its input."""
        channel = self.calls[node].options["channel"]
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        for batch in range(len(self.batches)):
            z = self._output(node, batch, filters, channels)
            z = z if z.device.type == "mps" else z.double()
            others = [d for d in range(z.dim()) if d != channel % z.dim()]
            total, square = total + z.sum(others), square + z.square().sum(others)
            count += z.numel() // z.shape[channel]
        if count < 2:
            raise NormPropError("calibrate cannot measure a variance from one value a channel.\nPass more samples.")
        mean = total / count
        if not bool(torch.isfinite(square).all()):
            raise NotFiniteError("values behind a layer are not finite.")
        return mean, (square / count - mean.square()).clamp(min=1e-12)


@torch.no_grad()
def _functions(lane: LaneValues, calls: Mapping[fx.Node, SiteCall]) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """Factor and offset of every site as it is."""
    found = {}
    for node, call in calls.items():
        form, given = site_operands(lane.arguments(call))
        with full_precision(given.shift):
            scale = plain_scale(form, given, multiplied=False)
        assert scale.factor is not None
        found[node] = scale.factor, scale.offset
    return found


def _keep(site: Site, factor: Tensor, offset: Tensor, measured: Statistics, *, first: bool) -> Statistics:
    """Statistics with which a site's factor and offset stay, the measured ones if γ and β can take up the difference."""
    if site.weight is not None and site.bias is not None and first:
        mean, var = (t.to(factor.dtype) for t in measured)
        site.weight.copy_(factor * var.sqrt())
        site.bias.copy_(offset + mean * factor)
        return measured
    gamma = torch.ones_like(factor) if site.weight is None else site.weight.to(factor.dtype)
    beta = torch.zeros_like(offset) if site.bias is None else site.bias.to(offset.dtype)
    safe = torch.where(factor == 0, 1.0, factor)
    mean = torch.where(factor == 0, measured[0], (beta - offset) / safe)
    return mean, torch.where(factor == 0, measured[1], (gamma / safe).square())


def _own_output(site: Site, bias: Tensor | None, mean: Tensor, var: Tensor, *, first: bool) -> Statistics:
    """Statistics with which ``γ (z − mean)/√var + β`` is ``z + b``; the site's first call sets γ and β."""
    assert site.weight is not None
    assert site.bias is not None
    offset = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    if first:
        site.weight.copy_(torch.where(var > 0, var, 1.0).sqrt())
        site.bias.copy_(mean + offset)
    return site.bias - offset, site.weight.square()
