"""Constants (d, k, U) of each site, measured on data in one pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normprop.conversion.entry import Entry, Key
from normprop.conversion.epsilon import bounded
from normprop.conversion.lane import Lane, converted_lane
from normprop.conversion.lockstep import LockStep
from normprop.conversion.measuring_mode import measuring, take_paths_of_training
from normprop.conversion.site_constants import Statistics, free_sites, keep_function, set_constants
from normprop.errors import NormPropError, NotFiniteError
from normprop.graph.example_inputs import Inputs, batch_inputs
from normprop.precision import full_precision
from normprop.sites.directions import principal_directions
from normprop.sites.site import Site, SiteArguments, site_operands, site_statistics

# Samples that directions are measured on at least.
_FEWEST = 2


def calibrate(
    model: nn.Module, data: Any, *, directions: int = 8, shrinkage: float = 0.0, preserve: bool = False
) -> nn.Module:
    """Set every site's constants from data, so that each site standardises what it really sees.

    One pass through the network: a site is measured after the sites before it are calibrated. With the measured mean and
    variance of the layer's output z, d = (E z − E)/√V and k = Var z / V; from there on the computed E and V follow the
    parameters, as without calibration.

    V takes the numbers in a filter's window for independent, and images are not: neighbouring pixels and channels vary
    together, and filters that add them up have many times the variance V has for them. So the `directions` U_r along which
    a layer's input varies most are measured first, and V = Σ c² v + Σ_r (Σ c √v U_r)² from there on, also while filters turn
    towards them. This is what lets a network train at BatchNorm's learning rates without clipping. With clipped gradients it
    learns better with a covariance that is shrunk towards independence (docs/laboratory.md).

    Args:
        model: a network that `convert` made; its constants are changed in place, and with `preserve` γ and β.
        data: a tensor of samples ``(N, …)``, or an iterable of batches (a DataLoader): tensors, tuples whose first entries
            are the network's inputs, or mappings of keyword arguments. All batches are carried through the network
            together: a few hundred samples are enough.
        directions: how many to measure in front of each layer (of transposed convolutions none); 0 for independence. Each
            costs as many operations per step as one more output position of every layer.
        shrinkage: α in [0, 1], by which their covariance is shrunk: V counts (1 − α) of what they add. At 1 they add
            nothing.
        preserve: change γ and β with the constants, so that the network computes what it did before. (Those of a site that
            is used several times follow its first call; the others, sites that share γ or β with another module, and sites
            without γ and β, keep their function by their constants, and don't standardise.)

    Returns:
        The model.

    Raises:
        NormPropError: the model is not a converted one; no data; `directions` below 0, or `shrinkage` outside [0, 1];
            batches that take different paths through the network.
        NotFiniteError: values that are not finite, of the data or in the network.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> x = 3 * torch.randn(256, 4) + 1
        >>> y = normprop.calibrate(normprop.convert(net), x)(x)
        >>> bool((y.mean(0).abs() < 1e-4).all() and (y.var(0) - 1).abs().max() < 0.01)
        True
    """
    lane = converted_lane(model, "calibrate")
    if lane.method != "exact":
        raise NormPropError("the paper's form has no constants to calibrate.\nConvert with method='exact'.")
    if directions < 0:
        raise NormPropError(f"directions is {directions}.\nUse 0 or more.")
    if not 0 <= shrinkage <= 1:
        raise NormPropError(f"shrinkage is {shrinkage}.\nUse a number from 0 to 1.")
    batches = samples(data, next(model.parameters()).device, lane.example, model)
    kept = {entry.site for entry in lane.all_entries()} if preserve else ()
    calibrate_keeping(model, lane, batches, directions if shrinkage < 1 else 0, shrinkage, kept)
    return model


def calibrate_keeping(
    model: nn.Module,
    lane: Lane,
    batches: Sequence[Inputs],
    directions: int,
    shrinkage: float,
    kept: Collection[str],
    patches: int | None = None,
) -> None:
    """`calibrate` with the function of some sites preserved, and that of others not.

    Args:
        model: a network that `convert` made.
        lane: its lane.
        batches: what to measure.
        directions: as for `calibrate`, and so is `shrinkage`.
        shrinkage: below 1 where there are directions.
        kept: paths of the sites whose function stays.
        patches: how many positions of a layer's input suffice for its directions; None for all.
    """
    _Calibration(model, lane, batches, directions, shrinkage, kept, patches).run()


def samples(data: Any, device: torch.device, example: Inputs, model: nn.Module) -> list[Inputs]:
    """The batches of a tensor or loader as a network's inputs, checked, on a device.

    Args:
        data: see `calibrate`.
        device: to bring them to.
        example: what the network takes.
        model: the network.

    Raises:
        NormPropError: no samples.
        NotFiniteError: values that are not finite.
    """
    if isinstance(data, Tensor | Inputs):
        data = [data]
    if not isinstance(data, Iterable):
        raise NormPropError(f"samples are measured, and {type(data).__name__} holds none.\nPass a tensor or a loader.")
    batches = [batch_inputs(batch, example, model).map(lambda t: t.to(device)) for batch in data]
    tensors = [t for batch in batches for t in batch.tensors()]
    if not tensors or any(t.numel() == 0 for t in tensors):
        raise NormPropError("there is no data to measure.")
    if not all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point()):
        raise NotFiniteError("the data to measure holds values that are not finite.")
    return batches


class _Calibration:
    """Watches a network's forward and sets the constants of every site before it runs.

    Args:
        model: the network.
        lane: its lane.
        batches: what to measure.
        directions: how many to measure of each layer's input.
        shrinkage: of their covariance.
        keep: sites whose function stays.
        patches: positions of a layer's input that suffice for its directions; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        lane: Lane,
        batches: Sequence[Inputs],
        directions: int,
        shrinkage: float,
        keep: Collection[str],
        patches: int | None = None,
    ) -> None:
        self.model, self.lane, self.batches = model, lane, batches
        self.directions, self.shrinkage, self.patches = directions, shrinkage, patches
        self.kept = self._functions(keep)
        self.free = free_sites(model)
        self.done: set[Key] = set()
        self.steps = LockStep(len(batches))

    @torch.no_grad()
    def run(self) -> None:
        """Calibrate the sites of evaluation, then those that only training has."""
        runs = [functools.partial(self.model, *batch.args, **batch.kwargs) for batch in self.batches]
        with measuring(self.model):
            self.lane.observer = self
            try:
                self.steps.run(runs)
                if any(entry.key not in self.done for entry in self.lane.entries[True]):
                    take_paths_of_training(self.model)
                    self.steps.run(runs)
            finally:
                self.lane.observer = None

    def at_layer(self, entry: Entry, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a layer runs: set the constants of the site after it."""
        self.steps.meet(entry, args, lambda inputs: self._set_layer(entry, layer, inputs))

    def at_output(self, entry: Entry, layer: nn.Module, output: Tensor, rest: Statistics) -> None:
        """After a layer has run: nothing."""

    def at_site(self, entry: Entry, x: Tensor) -> None:
        """Before a site scales its input: set its constants."""
        self.steps.meet(entry, x, lambda inputs: self._set_affine(entry, inputs))

    def _functions(self, sites: Collection[str]) -> dict[Key, tuple[Tensor, Tensor]]:
        """Factor and offset of some sites as they are."""
        with torch.no_grad():
            return {e.key: self.lane.function(self.model, e) for e in self.lane.all_entries() if e.site in sites}

    def _set_layer(self, entry: Entry, layer: nn.Module, inputs: Sequence[tuple[Any, ...]]) -> None:
        if entry.key in self.done:
            return
        site: Any = self.model.get_submodule(entry.site)
        run: Callable[[Tensor, int], Tensor] = lambda filters, batch: _output(layer, filters, inputs[batch])
        few = inputs if self.patches is None else [_first_samples(args, self.patches) for args in inputs]
        call = self.lane.arguments(self.model, entry)
        on_few: Callable[[Tensor, int], Tensor] = lambda filters, batch: _output(layer, filters, few[batch])
        self._set_directions(entry, site, call, on_few)
        filters, mean, var = site_statistics(call)
        assert filters is not None
        kind = next(layer.parameters()).dtype
        outputs = (run(filters.to(kind), batch) for batch in range(len(inputs)))
        found = _measured(outputs, entry.options["channel"])
        self._finish(entry, site, (found[0], bounded(entry, call, found[1], var)), mean, var)

    def _set_affine(self, entry: Entry, inputs: Sequence[Tensor]) -> None:
        if entry.key in self.done:
            return
        site: Any = self.model.get_submodule(entry.site)
        call = self.lane.arguments(self.model, entry)
        _, mean, var = site_statistics(call)
        found = _measured(inputs, 1)
        self._finish(entry, site, (found[0], bounded(entry, call, found[1], var)), mean, var)

    def _finish(self, entry: Entry, site: Site, target: Statistics, mean: Tensor, var: Tensor) -> None:
        if entry.key in self.kept:
            free = entry.call == 0 and site in self.free
            target = keep_function(site, *self.kept[entry.key], target, free=free)
        set_constants(site, entry.call, target, mean, var)
        self.done.add(entry.key)

    def _set_directions(self, entry: Entry, site: Site, call: SiteArguments, run: Callable[[Tensor, int], Tensor]) -> None:
        """Measure those of the input of the layer before a site."""
        form, given = site_operands(call)
        found = None
        layers = {other.layer for other in self.lane.all_entries() if other.site == entry.site}
        if given.weight is not None and not form.transposed and self.directions and len(layers) == 1:
            with full_precision(given.shift):
                found = principal_directions(
                    run,
                    len(self.batches),
                    form,
                    given,
                    self.directions,
                    channel=entry.options["channel"],
                    shrinkage=self.shrinkage,
                )
        several = site.shift.dim() == 2
        if found is None:
            if site.directions is not None:
                (site.directions[entry.call] if several else site.directions).zero_()
            return
        shape = (len(site.shift), *found.shape) if several else found.shape
        if site.directions is None or site.directions.shape != shape:
            site.directions = nn.Parameter(found.new_zeros(shape), requires_grad=False)
        (site.directions[entry.call] if several else site.directions).copy_(found)


def _first_samples(args: tuple[Any, ...], patches: int) -> tuple[Any, ...]:
    """A layer's arguments for as many samples as have so many positions, and no less than a few."""
    x = args[0]
    if not isinstance(x, Tensor) or x.dim() < 2:
        return args
    needed = max(_FEWEST, -(-patches // max(1, math.prod(x.shape[2:]))))
    return (x[:needed], *args[1:])


def _output(layer: nn.Module, filters: Tensor, args: tuple[Any, ...]) -> Tensor:
    """What a layer gives with other filters and no bias."""
    before: dict[str, Any] = {name: layer.__dict__[name] for name in ("weight", "bias") if name in layer.__dict__}
    own: dict[str, Any] = layer.__dict__
    half = isinstance(args[0], Tensor) and args[0].dtype in (torch.float16, torch.bfloat16)
    own["weight"], own["bias"] = filters.to(args[0].dtype) if half else filters, None
    try:
        output: Tensor = type(layer).forward(layer, *args)
    finally:
        for name in ("weight", "bias"):
            own.pop(name)
        own.update(before)
    return output


def _measured(outputs: Iterable[Tensor], channel: int) -> Statistics:
    """Mean and variance per channel of what a site standardises."""
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for output in outputs:
        z = output if output.device.type == "mps" else output.double()
        others = [d for d in range(z.dim()) if d != channel % z.dim()]
        total, square = total.to(z) + z.sum(others), square.to(z) + z.square().sum(others)
        count += z.numel() // z.shape[channel]
    if count < 2:
        raise NormPropError("calibrate cannot measure a variance from one value per channel.\nPass more samples.")
    mean = total / count
    if not bool(torch.isfinite(square).all()):
        raise NotFiniteError("values after a layer are not finite.")
    return mean, (square / count - mean.square()).clamp(min=0.0)
