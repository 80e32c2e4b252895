"""The whole recipe of training a converted network, in one line of anybody's loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from normprop.conversion.affine_groups import part_affines
from normprop.conversion.calibration import calibrate_keeping
from normprop.conversion.fresh_sites import fresh_sites
from normprop.conversion.lane import Lane, lane_of
from normprop.conversion.partial_centering import center_partly
from normprop.conversion.recalibration import affines_of, follow, measure_again, take_along
from normprop.conversion.sample_source import SampleSource
from normprop.conversion.stretch import search_beta_
from normprop.errors import NormPropError
from normprop.graph.example_inputs import Inputs
from normprop.optim import AdaptiveGradientClipping, clips

_LOG = logging.getLogger("normprop")
# The first step after which to calibrate again; then twice as late each time, until `every` is less.
_FIRST = 16
# Images of a batch that tell where β is to start, and positions of a layer's input for its directions.
_FEW, _PATCHES = 4, 512


def keep_calibrated(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    data: Any,
    *,
    samples: int = 16,
    directions: int = 8,
    shrinkage: float = 0.9,
    every: int = 200,
    clip: float | None = None,
    decay: bool = True,
    center: Literal["auto"] | bool = "auto",
    seed: int = 0,
) -> KeptCalibration:
    """Start a converted network well and keep it so, in a training loop of your own: one line, before the first step.

    Now, and not again where the optimizer has a state already:

    - a fresh network gets the β that `init_beta_` finds, where its own are all zero, and is calibrated;
    - in a trained one the constants are measured, and it computes what it did (`calibrate` with ``preserve=True``); layers
      in it that are fresh, as a new head is, are calibrated.

    From then on, by hooks of the optimizer:

    - before each step gradients are clipped by the size of what they change (`normprop.optim.AdaptiveGradientClipping`);
    - after steps 16, 32, 64, 128 and every 200th, constants are measured on a few samples, and what is found is given to γ
      and β and to what the optimizer remembers of them, so that the network computes what it did (`recalibrate`).

    Mind that a scheduler has to be made after this, if γ and β shall not decay. Learning rates stay yours.

    Args:
        model: a network that `convert` made, or what wraps it: `torch.compile`, DistributedDataParallel.
        optimizer: that trains it; several if they share its parameters, in the order in which they step (Muon and AdamW).
        data: samples to measure, as the network takes them: a tensor ``(N, …)``; a loader, of which the first few batches
            are read now and kept; or a function of the number of steps done, which returns either. For private training:
            public samples, or noise of the data's mean and variance. None measures nothing, and keeps what `convert`
            computed.
        samples: how many are measured each time; of what a function returns all are.
        directions: as for `calibrate`; measured at the start and kept.
        shrinkage: as for `calibrate`.
        every: steps between two measurements later on; 0 for none after the start.
        clip: the largest ratio of a gradient to what it changes, 0 for no clipping; by default 0.05, which Muon's parameters
            go without.
        decay: False moves γ and β to parameter groups without weight decay.
        center: True leaves filters of a fresh network 1/√n of their mean, n being how many inputs a filter has: whatever
            inputs have in common moves an output no more than other things do then. Every second filter starts with the
            mean that it was given nevertheless (docs/method.md): it is multiplied by √n in the network's weights. Filters
            that `convert` didn't centre stay so. False leaves all as `convert` made them; by default that goes for networks
            that were converted with a `center`.
        seed: of the choice of samples.

    Returns:
        What is watching. `print` it: one line says what was done. It has `state_dict` and `load_state_dict`, for a run that
        goes on as if it had not been interrupted; `follow`, for an average of the network; and `remove`.

    Raises:
        NormPropError: not a converted network, or one of the paper's form; an optimizer that doesn't train it; no data; a
            scheduler that was made too early.
        NotFiniteError: values that are not finite, of the data or in the network.

    Example:
        >>> import torch, normprop
        >>> layers = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        >>> model = normprop.convert(torch.nn.Sequential(*layers))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        >>> x, y = torch.randn(256, 4), torch.randint(2, (256,))
        >>> handle = normprop.keep_calibrated(model, optimizer, x)
        >>> for i in range(20):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        ...     optimizer.step()
        >>> handle.step, handle.measured
        (20, [0, 16])
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    network, lane = _converted(model)
    for name, number in (("samples", samples - 1), ("directions", directions), ("every", every), ("clip", clip or 0.0)):
        if number < 0:
            raise NormPropError(f"{name} is too small.\nUse {1 if name == 'samples' else 0} or more.")
    _check_trained(network, optimizers)
    if not decay:
        part_affines(lane, optimizers)
    source = None
    if data is not None:
        source = SampleSource(data, lane.example, network, count=samples, seed=seed)
    handle = KeptCalibration(network, lane, optimizers, source, every=every, clip=clip)
    if source is not None and not any(one.state for one in optimizers):
        partly = lane.center_open if center == "auto" else center
        handle.start(directions if shrinkage < 1 else 0, shrinkage, center=partly)
    _LOG.info("%s", handle)
    return handle


class KeptCalibration:
    """What `keep_calibrated` returns.

    Attributes:
        step: steps that the optimizer has done.
        measured: after which of them constants were measured.
        seconds: what this took.
    """

    def __init__(
        self,
        network: nn.Module,
        lane: Lane,
        optimizers: Sequence[Optimizer],
        source: SampleSource | None,
        *,
        every: int,
        clip: float | None,
    ) -> None:
        self.step = 0
        self.measured: list[int] = []
        self.seconds = 0.0
        self._network, self._lane, self._optimizers, self._source, self._every = network, lane, optimizers, source, every
        self._averages: list[nn.Module] = []
        self._started = "as it was"
        self._clippings = [
            AdaptiveGradientClipping(one, clip=bound, up_to=up_to)
            for one in optimizers
            for bound, up_to in [clips(one, clip)]
            if bound
        ]
        self._handle = optimizers[-1].register_step_post_hook(lambda *_: self._stepped())

    def start(self, directions: int, shrinkage: float, *, center: bool) -> None:
        """Set how far to centre, start β and calibrate; or calibrate alone where the network is trained."""
        assert self._source is not None
        began = time.perf_counter()
        batches = self._source.draw(0)
        fresh, trained = fresh_sites(self._network, self._lane)
        if center:
            center_partly(self._network, self._lane, fresh)
        if fresh and not trained:
            self._started = f"{self._start_biases(batches)}, calibrated"
        else:
            self._started = f"trained function kept{f', {len(fresh)} fresh ones calibrated' if fresh else ''}"
        calibrate_keeping(self._network, self._lane, batches, directions, shrinkage, trained, _PATCHES)
        self._agree()
        self._note(began)

    def _start_biases(self, batches: Sequence[Inputs]) -> str:
        """Find where β starts, if the network leaves that open; says where."""
        biases = [beta for _, beta in affines_of(self._lane)]
        if any(bool(beta.detach().any()) for beta in biases):
            return "β as it was initialised"
        few = [batch.map(lambda t: t[:_FEW] if t.dim() > 2 else t) for batch in batches]
        return f"β at {search_beta_(self._network, few, biases):g}"

    def follow(self, average: nn.Module) -> None:
        """Keep an average of the network in step: a copy of it, as `torch.optim.swa_utils.AveragedModel` makes one.

        γ and β mean something else after each measurement. The average's are changed with them, and it computes what it did.

        Args:
            average: the average, or what wraps it.

        Raises:
            NormPropError: it is no converted network.
        """
        found, _ = _converted(average)
        follow(found, self._network)
        self._averages.append(found)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, beside those of the model and the optimizer."""
        return {"step": self.step, "measured": list(self.measured), "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; load the model's and the optimizer's after `keep_calibrated` too."""
        self.step, self.measured, self.seconds = state["step"], list(state["measured"]), state["seconds"]

    def remove(self) -> None:
        """Leave the optimizer and the network alone from now on."""
        self._handle.remove()
        for clipping in self._clippings:
            clipping.remove()

    @property
    def clipped(self) -> float:
        """Fraction of filters, gains and biases whose gradient was clipped in the last step."""
        return max((float(clipping.fraction) for clipping in self._clippings), default=0.0)

    def __repr__(self) -> str:
        sites = len({entry.site for entry in self._lane.all_entries()})
        kinds = ", ".join(type(one).__name__ for one in self._optimizers)
        bounds = sorted({clipping.clip for clipping in self._clippings})
        clip = f"gradients of {kinds} clipped at {', '.join(f'{b:g}' for b in bounds)}" if bounds else f"{kinds} not clipped"
        if self._source is None:
            return f"{sites} sites, not measured; {clip}"
        early = [str(step) for step in range(1, self._every) if self._is_due(step)]
        when = f"measured again after steps {', '.join([*early, str(self._every)])}, and so on" if self._every else "no more"
        took = f"{len(self.measured)} times so far, {self.seconds:.1f} s"
        return f"{sites} sites, {self._started}; {when} ({took}); {clip}"

    def _is_due(self, step: int) -> bool:
        if not self._every:
            return False
        early = step >= _FIRST and step & (step - 1) == 0
        return step % self._every == 0 or (early and step < self._every)

    def _stepped(self) -> None:
        self.step += 1
        if self._source is not None and self._is_due(self.step):
            self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        assert self._source is not None
        began = time.perf_counter()
        affines = affines_of(self._lane)
        before = [(gamma.detach().clone(), beta.detach().clone()) for gamma, beta in affines]
        measure_again(self._network, self._lane, self._source.draw(self.step))
        self._agree()
        for one in self._optimizers:
            take_along(one, affines, before)
        for average in self._averages:
            follow(average, self._network)
        self._note(began)

    def _note(self, began: float) -> None:
        self.measured.append(self.step)
        self.seconds += time.perf_counter() - began

    def _agree(self) -> None:
        """Processes that train one network measure other samples each, and take what the first one found."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for path in sorted({entry.site for entry in self._lane.all_entries()}):
                site: Any = self._network.get_submodule(path)
                for parameter in site.parameters(recurse=False):
                    dist.broadcast(parameter.data, 0)
                site.center = float(site.record[0])


def _converted(model: nn.Module) -> tuple[nn.Module, Lane]:
    """The converted network in what was given, and its lane."""
    network: Any = model
    while isinstance(network, nn.Module) and lane_of(network) is None:
        inner = network._modules.get("_orig_mod") or network._modules.get("module")
        if inner is None:
            break
        network = inner
    lane = lane_of(network) if isinstance(network, nn.Module) else None
    if lane is None:
        raise NormPropError(
            f"keep_calibrated takes a network that convert made, not a {type(model).__name__}.\n"
            "Convert it first; of a network with a converted part give that part."
        )
    if lane.method != "exact":
        raise NormPropError("the paper's form has no constants to calibrate.\nConvert with method='exact'.")
    return network, lane


def _check_trained(network: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    if not held & {id(p) for p in network.parameters() if p.requires_grad}:
        raise NormPropError(
            "the optimizer has no parameter of this network.\nMake the optimizer after convert, from model.parameters()."
        )
