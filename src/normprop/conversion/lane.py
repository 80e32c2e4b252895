"""The moment lane of a converted network: from parameters to the effective weight and bias of every layer with a site."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from normprop.conversion.entry import Entry
from normprop.conversion.lane_errors import ambiguous, refuse_sample_gradients, unrecorded_call
from normprop.conversion.lane_programs import LanePrograms
from normprop.conversion.placement import Placement, is_attached, is_plain
from normprop.conversion.program_calls import raw
from normprop.conversion.run import Handed, Run
from normprop.errors import NormPropError
from normprop.graph.example_inputs import Inputs
from normprop.native.library import library
from normprop.sites.site import Site

# In place of a thread's number. There from the start: a graph that made it would be traced again once it is there.
_TRACED = 0


class Lane(LanePrograms):
    """What a converted network computes on its parameters before the data comes by; `print` shows it.

    One forward of the network evaluates it once. A part called by itself evaluates what each of its layers needs.

    Args:
        root: the network.
        entries: of all sites, those of evaluation first.
        layers: for each mode the entries of a layer's calls, None for a call that no site follows.
        example: inputs of the record, on the meta device.
        method: "exact" or "paper".

    Attributes:
        filters: weights that nothing but sites reads, as `normprop.optim` takes them.
        center_open: whether nobody said how far filters are centred, so that `keep_calibrated` may leave part of their mean.
        initial: γ and β that a fresh network started with, by site; of a trained one nothing.
        observer: what calibration puts between layers and sites while it runs.
        shared: scales that micro-batches share, see `accumulate`.
    """

    def __init__(
        self,
        root: nn.Module,
        entries: Mapping[bool, Sequence[Entry]],
        layers: Mapping[bool, Mapping[str, list[Entry | None]]],
        example: Inputs,
        method: str,
    ) -> None:
        super().__init__(root, entries)
        self.layers = {mode: dict(of) for mode, of in layers.items()}
        self.example = example
        self.method = method
        self.filters: list[dict[str, Any]] = []
        self.center_open = False
        self.initial: dict[str, tuple[float, float]] = {}
        self.observer: Any = None
        self.shared: Any = None
        self.runs = {_TRACED: Run()}

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to the process."""
        return vars(self) | {"runs": {_TRACED: Run()}, "observer": None, "shared": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Lane:
        copied = Lane.__new__(Lane)
        memo[id(self)] = copied
        for name, value in (self.__getstate__() | {"programs": {}}).items():
            setattr(copied, name, copy.deepcopy(value, memo))
        copied.programs = dict(self.programs)  # which name modules by their paths
        return copied

    def __repr__(self) -> str:
        sites = len({entry.site for entry in self.all_entries()})
        return f"moment lane of {type(self.root).__name__}: {sites} sites, {self._engine()}\n{self.code}"

    def _engine(self) -> str:
        """What runs it."""
        program = self.compiled(self.root, self.entries[self.root.training])
        if program is None:
            reason = library()
            return f"in torch's operations{f': {reason}' if isinstance(reason, str) else ''}"
        segments = program.code.count("run_segment(")
        return f"{segments} compiled segment{'s' * (segments != 1)}"

    @property
    def code(self) -> str:
        """What is computed, as Python; compiled segments compute the same."""
        return self.program(self.entries[self.root.training]).code

    def run(self) -> Run:
        """The present thread's."""
        if is_compiling():
            return self.runs[_TRACED]
        thread = threading.get_ident()
        found = self.runs.get(thread)
        if found is None:
            found = self.runs[thread] = Run()
        return found

    # What hooks call

    def begin(self, root: nn.Module) -> None:
        """The network's forward starts."""
        run = self.run()
        run.calls.clear()
        run.handed.clear()
        run.values = {}
        if self.observer is None:
            entries, sites = self._attached(run, root)
            run.values = self.evaluate(root, entries) if self.shared is None else self.shared(root, entries)
            run.ready = {}
            layers = self.layers[root.training]
            for entry, site in zip(entries, sites, strict=True):
                scale = run.values[entry.key]
                if entry.layer is not None and scale.weight is not None and len(layers.get(entry.layer, ())) == 1:
                    run.ready[entry.layer] = entry, scale.weight, scale.offset, site
        run.root = root

    def _attached(self, run: Run, root: nn.Module) -> tuple[Sequence[Entry], Sequence[nn.Module | None]]:
        """The entries whose layers will ask for their effective weight, and their sites."""
        if is_compiling():
            entries = [entry for entry in self.entries[root.training] if is_attached(root, entry)]
            return entries, [None] * len(entries)
        known = run.placements.get(root.training)
        if known is None or not known.holds(root):
            known = Placement(root, self.entries[root.training])
            if "_is_replica" not in root.__dict__:  # which live for one forward
                run.placements[root.training] = known
        return known.attached, known.sites

    def end(self) -> None:
        """The network's forward is over."""
        run = self.run()
        run.root, run.values, run.ready = None, {}, {}
        run.calls.clear()
        run.handed.clear()

    def called(self, layer: nn.Module, path: str, args: tuple[Any, ...]) -> Entry | None:
        """The entry of a layer that is about to run; None if no site follows this call of it.

        Raises:
            NormPropError: the call was not recorded, or can't be told from others.
        """
        run = self.run()
        entry = self._called(run, path)
        if entry is not None and self.observer is not None:
            self.observer.at_layer(entry, layer, args)
        return entry

    def cover(self, layer: nn.Module, entry: Entry) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """Effective weight and bias of a layer, and what is still to be applied after it.

        That is factor and offset if something wraps the layer, which then runs with bare filters.
        """
        run = self.run()
        scale = run.values.get(entry.key)
        root = run.root or self.root
        plain = self.observer is None and is_plain(root, entry, layer)
        if scale is None or not plain:
            if not plain:
                refuse_sample_gradients(layer, entry)
                filters, factor, offset = self.parts(root, entry, layer)
                bias = raw(layer, "bias")
                return filters, bias, (factor, offset if bias is None else offset - factor * bias)
            scale = self.evaluate(root, [entry])[entry.key]
        assert scale.weight is not None
        kind = raw(layer, "weight").dtype
        return scale.weight.to(kind), scale.offset.to(kind), None

    def standardise(self, path: str, x: Tensor) -> Tensor:
        """The input of a layer of the paper's form."""
        run = self.run()
        root = run.root or self.root
        calls = self.standards[root.training].get(path) or self.standards[not root.training].get(path) or []
        call = 0
        if len(calls) > 1:
            if run.root is None:
                raise ambiguous(path, len(calls))
            call = run.calls.get(f"{path} input", 0)
            run.calls[f"{path} input"] = call + 1
        if call >= len(calls):
            raise unrecorded_call(path, call)
        if calls[call] is None:
            return x
        mean, scale = self.standard(root, path, call, calls[call])
        return (x - mean.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def leave(run: Run, entry: Entry, output: Tensor, rest: tuple[Tensor, Tensor] | None) -> None:
        """A layer has given its output to its site."""
        counts = not (is_compiling() or output.is_inference())
        given = Handed(entry, output, rest, output._version if counts else None)
        waiting = None if run.root is None else run.handed.get(entry.site)
        if waiting is None:
            run.handed[entry.site] = [given]
        else:
            waiting.append(given)

    def arrive(self, site: Site, x: Tensor) -> Tensor:
        """What a site makes of its input.

        Raises:
            NormPropError: the layer before the site did not run with its effective weight, or something changed what it
                gave since the conversion; the site was not recorded, or its call can't be told from others.
        """
        run = self.run()
        if waiting := run.handed.get(site.path):
            at = 0 if len(waiting) == 1 else next((i for i, given in enumerate(waiting) if given.output is x), 0)
            given = waiting.pop(at)
            run.calls[site.path] = run.calls.get(site.path, 0) + 1
            if given.rest is not None:
                return self._affine(x, *given.rest, 1)
            if not given.is_intact(x):
                raise NormPropError(
                    f"something changed what {given.entry.layer} gives to {site.path} since the conversion.\n"
                    "Convert again, from the network with that change in it."
                )
            return x
        entry = self._affine_entry(run, site)
        root = run.root or self.root
        if self.observer is not None:
            self.observer.at_site(entry, x)
        scale = run.values.get(entry.key) if self.observer is None else None
        if scale is None:
            scale = self.evaluate(root, [entry])[entry.key]
        assert scale.factor is not None
        return self._affine(x, scale.factor, scale.offset, 1)

    @staticmethod
    def _affine(x: Tensor, factor: Tensor, offset: Tensor, channel: int) -> Tensor:
        shape = [1] * x.dim()
        shape[channel] = -1
        return torch.addcmul(offset.to(x.dtype).reshape(shape), x, factor.to(x.dtype).reshape(shape))

    def _called(self, run: Run, path: str) -> Entry | None:
        """The entry of a layer's present call."""
        mode = self.root.training if run.root is None else run.root.training
        entries = self.layers[mode].get(path) or self.layers[not mode].get(path) or []
        if len(entries) == 1 and run.root is None:
            return entries[0]
        if run.root is None:
            raise ambiguous(path, len(entries))
        call = run.calls.get(path, 0)
        run.calls[path] = call + 1
        if call >= len(entries):
            raise unrecorded_call(path, call)
        return entries[call]

    def _affine_entry(self, run: Run, site: Site) -> Entry:
        entries = self.by_site.get(site.path)
        if not entries:
            raise unrecorded_call(site.path, 0)
        if run.root is None and len(entries) > 1:
            raise ambiguous(site.path, len(entries))
        call = run.calls.get(site.path, 0)
        if run.root is not None:
            run.calls[site.path] = call + 1
        entry = entries.get(call)
        if entry is None:
            raise unrecorded_call(site.path, call)
        if entry.layer is not None:
            raise NormPropError(
                f"{site.path} was reached, and {entry.layer}, which it normalises, has not run before it: it was replaced "
                "or left out since the conversion.\nConvert again, from the network with that change in it."
            )
        return entry


def lane(model: nn.Module) -> Lane:
    """The moment lane of a converted network: what it computes from its parameters; ``print(normprop.lane(model))``.

    Raises:
        NormPropError: `convert` did not make the model.

    Example:
        >>> import torch, normprop
        >>> model = normprop.convert(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8)))
        >>> "site_scales" in normprop.lane(model).code
        True
    """
    return converted_lane(model, "lane")


def converted_lane(model: nn.Module, verb: str) -> Lane:
    """The lane of a network that `convert` made.

    Raises:
        NormPropError: it did not.
    """
    found = lane_of(model)
    if found is None:
        raise NormPropError(f"{verb} takes a network that convert made, not a {type(model).__name__}.\nConvert it first.")
    return found


def lane_of(model: nn.Module) -> Lane | None:
    """The lane that a module's own forward evaluates; None if it has none."""
    hooks: Any = model._forward_pre_hooks.values() if isinstance(model, nn.Module) else ()
    return next((hook.lane for hook in hooks if getattr(hook, "begins", False)), None)


def lanes_in(model: nn.Module) -> list[Lane]:
    """The lanes of a module and of its parts."""
    return [found for module in model.modules() if (found := lane_of(module)) is not None]


def sites_of(lanes: Iterable[Lane]) -> list[Site]:
    """The sites of lanes, each once."""
    return list(
        {
            id(s): s for one in lanes for e in one.all_entries() if isinstance(s := one.root.get_submodule(e.site), Site)
        }.values()
    )
