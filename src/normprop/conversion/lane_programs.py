"""The programs of a moment lane, and what they give with the present parameters of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normprop.conversion.entry import Entry, Key
from normprop.conversion.lane_errors import refuse_shards
from normprop.conversion.placement import is_attached, module_of
from normprop.conversion.program import Program, written
from normprop.conversion.program_calls import raw, site_at
from normprop.graph.node import Node
from normprop.graph.unrecorded import unrecorded
from normprop.native.operands import is_native, is_native_whole
from normprop.sites.reference import Scale, inverse_root
from normprop.sites.site import Site, site_parts
from normprop.traced_constant import traced_constant


class LanePrograms:
    """What a lane computes, written out as it is asked for.

    Args:
        root: the network.
        entries: of all sites, those of evaluation first.

    Attributes:
        by_site: the entries of every site, by its calls.
        standards: of the paper's form, for each mode and layer, what the input of each call is standardised by.
        programs: those that were written, by what they are for.
    """

    def __init__(self, root: nn.Module, entries: Mapping[bool, Sequence[Entry]]) -> None:
        self.root = root
        self.entries = {mode: list(of) for mode, of in entries.items()}
        self.by_site: dict[str, dict[int, Entry]] = {}
        for entry in self.all_entries():
            self.by_site.setdefault(entry.site, {})[entry.call] = entry
        self.standards: dict[bool, dict[str, list[Node | None]]] = {False: {}, True: {}}
        self.programs: dict[Any, Program] = {}

    def all_entries(self) -> list[Entry]:
        """The entries of both modes, each once."""
        return list({entry.key: entry for mode in (False, True) for entry in self.entries[mode]}.values())

    def program(self, entries: Sequence[Entry]) -> Program:
        """The program for some entries, written when it is first asked for."""
        return self._written(tuple(entry.key for entry in entries), [entry.scale for entry in entries])

    def prepare(self) -> None:
        """Write the programs that forwards need: when torch.compile traces the first of them it is too late."""
        for mode, entries in self.entries.items():
            self.program([entry for entry in entries if is_attached(self.root, entry)])
            for entry in entries:
                if entry.moments is not None and not is_attached(self.root, entry):
                    self._written(("moments", entry.key), [entry.moments])
            for path, calls in self.standards[mode].items():
                for call, node in enumerate(calls):
                    if node is not None:
                        self._written(("standard", path, call, mode), [node])

    def _written(self, key: Any, nodes: Sequence[Node]) -> Program:
        if key not in self.programs:
            self.programs[key] = written(nodes, self.root)
        return self.programs[key]

    @unrecorded
    def evaluate(self, root: nn.Module, entries: Sequence[Entry]) -> dict[Key, Scale]:
        """The scales of some entries with a network's present parameters.

        Raises:
            NormPropError: parts of the network are sharded by themselves.
        """
        with torch.autograd.graph.saved_tensors_hooks(_same, _same) if _hooked() else _NOTHING:
            try:
                values = (self.compiled(root, entries) or self.program(entries)).function(root)
            except RuntimeError:
                refuse_shards(root)
                raise
        return {entry.key: value for entry, value in zip(entries, values, strict=True)}

    def compiled(self, root: nn.Module, entries: Sequence[Entry]) -> Program | None:
        """The program in compiled segments, where these can run."""
        if torch.compiler.is_compiling():
            runs = bool(entries) and is_native_whole(root) and _written_ahead(self, root, tuple(e.key for e in entries))
        else:
            runs = bool(entries) and is_native(_constant(root, entries[0]))
            if runs:
                self._write_compiled(root, entries)
        return self.programs["compiled", *(entry.key for entry in entries)] if runs else None

    def _write_compiled(self, root: nn.Module, entries: Sequence[Entry]) -> None:
        key = "compiled", *(entry.key for entry in entries)
        if key not in self.programs:
            with torch.no_grad():
                self.program(entries).function(root)  # says what was changed since the conversion
            self.programs[key] = written([entry.scale for entry in entries], root, compiled=True)

    @unrecorded
    def standard(self, root: nn.Module, path: str, call: int, node: Any) -> tuple[Tensor, Tensor]:
        """Mean and 1/std by which an input is standardised; of a constant, the state a recurrence starts from, 1."""
        (moments,) = self._written(("standard", path, call, root.training), [node]).function(root)
        return moments.mean, inverse_root(torch.ones_like(moments.var), moments.var)

    @unrecorded
    def parts(self, root: nn.Module, entry: Entry, layer: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Filters, factor and offset of a layer apart, with the dtype of the layer's weight.

        Args:
            root: the network.
            entry: of the layer.
            layer: itself, where something wraps it and has its path.
        """
        call = self.arguments(root, entry, layer)
        filters, factor, offset = site_parts(call)
        assert call[0] is not None
        assert filters is not None
        return filters.to(call[0].dtype), factor, offset

    def function(self, root: nn.Module, entry: Entry) -> tuple[Tensor, Tensor]:
        """Factor and offset of a site, with a layer or without."""
        if entry.layer is not None:
            return self.parts(root, entry)[1:]
        scale = self.evaluate(root, [entry])[entry.key]
        assert scale.factor is not None
        return scale.factor, scale.offset

    @unrecorded
    def arguments(
        self, root: nn.Module, entry: Entry, layer: nn.Module | None = None
    ) -> tuple[Tensor | None, Site, Any, Mapping[str, Any]]:
        """What `site_scales` takes for one entry."""
        parent, _, name = entry.site.rpartition(".")
        site: Any = site_at(root.get_submodule(parent), name, entry.site) if name else root
        moments = None
        if entry.moments is not None:
            (moments,) = self._written(("moments", entry.key), [entry.moments]).function(root)
        weight = None if entry.layer is None else raw(layer or root.get_submodule(entry.layer), "weight")
        return weight, site, moments, entry.options


@traced_constant
def _written_ahead(lane: LanePrograms, root: nn.Module, keys: tuple[Key, ...]) -> bool:
    """Write the program in compiled segments that a graph is about to read; runs while the graph is traced."""
    lane._write_compiled(root, [lane.by_site[site][call] for site, call in keys])
    return True


def _constant(root: nn.Module, entry: Entry) -> Tensor | None:
    """A tensor of a network's first site."""
    site = module_of(root, entry.site_names)
    return None if site is None else site._parameters.get("shift")


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


_NOTHING = _Nothing()


def _hooked() -> bool:
    """Whether saved tensors are watched, as by a checkpoint, which must not count those of the lane."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
