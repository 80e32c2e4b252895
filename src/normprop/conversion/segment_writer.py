"""Writes part of a moment lane as a compiled segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from normprop.channel_moments import Moments
from normprop.conversion.compiled_segment import run_segment
from normprop.conversion.held_operations import AVERAGES, factors_of, kind_of, setting_of, shape_of
from normprop.conversion.segment import Kind, Map, Place, Scaling, Segment, Step
from normprop.graph.node import Node
from normprop.rules import arithmetic
from normprop.rules.elementwise import module_activation
from normprop.sites.rows import Form
from normprop.sites.site import site_scales


class SegmentGroup:
    """Nodes of a lane that one `Segment` gives.

    Args:
        segment: what computes them.
        nodes: those that others read, in the order in which it returns them.
        arguments: nodes of weights, sites, modules, given moments and maps.
        held: all nodes that it computes.
    """

    def __init__(
        self, segment: Segment, nodes: Sequence[Node], arguments: Sequence[Sequence[Node]], held: Sequence[Node]
    ) -> None:
        self.segment, self.nodes, self.arguments, self.held = segment, nodes, arguments, held

    def reads(self) -> list[Node]:
        """The nodes that the one call reads."""
        return [node for some in self.arguments for node in some]

    def has_tensors(self) -> bool:
        """Whether any of those holds numbers: a constant through activations has neither dtype nor gradient."""
        return bool(self.segment.weights or self.segment.channels or self.segment.given or self.segment.maps)

    def call(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The one call: it returns an entry per node."""
        calls = tuple((s.site, s.weight, s.call) for s in self.segment.scalings)
        return run_segment, (self.segment, calls, *map(tuple, self.arguments)), {}


class SegmentWriter:
    """Lays out the memory of a segment and writes its steps.

    Args:
        nodes: what it is to hold, in order.
        values: of all nodes.
        wanted: those that are read elsewhere.
    """

    def __init__(self, nodes: Sequence[Node], values: dict[Node, Any], wanted: set[Node]) -> None:
        self.nodes, self.values, self.wanted = nodes, values, wanted
        self.steps: list[Step] = []
        self.places: dict[Node, Place] = {}
        self.joins: list[tuple[Place, tuple[Place, ...]]] = []
        self.size = 0
        self.weights: dict[Node, int] = {}
        self.sites: dict[Node, int] = {}
        self.modules: dict[Node, int] = {}
        self.given: dict[Node, int] = {}
        self.maps: dict[Node, int] = {}

    def group(self) -> SegmentGroup:
        """The segment with what it reads."""
        scalings, scaled, exported = [], [], []
        for node in self.nodes:
            if node.target is site_scales:
                scalings.append(self._scaling(node))
                scaled.append(node)
                continue
            self.places[node] = self._placed(node)
            if node in self.wanted:
                exported.append(node)
        exports = [(self.places[n], tuple(shape_of(self.values[n]))) for n in exported]
        self.steps += (Step(Kind.READ, place, source=i) for i, (place, _) in enumerate(exports))
        given = [self.values[n] for n in self.given]
        segment = Segment(
            tuple(self.steps), tuple(scalings), tuple(exports), tuple(self.joins), self.size,
            tuple(self.values[n].num_features for n in self.sites),
            tuple((m.mean.numel(), m.var.numel()) for m in given), len(self.weights),
            tuple(map(_map, map(self.values.__getitem__, self.maps))),
        )  # fmt: skip
        arguments = [list(some) for some in (self.weights, self.sites, self.modules, self.given, self.maps)]
        return SegmentGroup(segment, [*scaled, *exported], arguments, self.nodes)

    def _scaling(self, node: Node) -> Scaling:
        weight, site, moments, options = node.args[0]
        stride = options.get("transposed_stride", 0)
        center = 0.0 if weight is None else self.values[site].center
        form = Form(options.get("groups", 1), stride > 0, max(stride, 1), center)
        index: int | None = None
        shape: tuple[int, ...] = ()
        count = self.values[site].num_features
        if weight is not None:
            index, shape = _index(self.weights, weight), tuple(self.values[weight].shape)
            count = shape[0] if form.transposed else shape[1] * form.groups
        place = None if moments is None else self._read(moments)
        if place is not None and place.size != count:
            place = self._written(Kind.COPIED, self._place(count), place)
        return Scaling(_index(self.sites, site), index, shape, place, form, options.get("call", 0))

    def _placed(self, node: Node) -> Place:
        """The place of a node's moments, and the steps that fill it."""
        kind = kind_of(node, self.values)
        size = shape_of(self.values[node]).numel()
        sources = [n for n in node.inputs if isinstance(self.values.get(n), Moments)]
        if kind is Kind.COPIED:
            return self._read(sources[0])
        if kind is Kind.READ:
            return self._joined(node)
        out = self._place(size)
        if kind is Kind.STANDARD:
            return self._written(kind, out)
        if kind is Kind.SITE:
            return self._written(kind, out, source=_index(self.sites, node.args[0][0]))
        if kind in (Kind.RECTIFIED, Kind.CURVED):
            return self._activated(kind, node, out, sources[0])
        if kind is Kind.MAPPED:
            return self._written(kind, out, self._read(sources[0]), source=_index(self.maps, node.args[0]))
        if kind is not None and (kind is Kind.LARGEST or node.target in AVERAGES):
            number, other = factors_of(node, sources[0], self.values)
            return self._written(kind, out, self._read(sources[0]), number=number, other=other)
        if kind is Kind.WIDENED:
            return self._written(kind, out, self._read(sources[0]), other=node.args[1])
        if kind is Kind.SUM:
            first, second = map(self._read, node.args)
            factor = float(node.kwargs.get("alpha", 1)) * (-1.0 if node.target is arithmetic.sub else 1.0)
            return self._written(kind, out, first, second, number=factor)
        if kind is Kind.PRODUCT:
            first, second = map(self._read, node.args)
            return self._written(kind, out, first, second)
        if kind is Kind.SCALED:
            factor = next((float(a) for a in node.args if type(a) in (int, float)), 1.0 + node.kwargs.get("alpha", 1))
            return self._written(kind, out, self._read(sources[0]), number=factor, other=factor * factor)
        assert kind is Kind.DETACHED
        return self._written(kind, out, self._read(sources[0]))

    def _activated(self, kind: Kind, node: Node, out: Place, source: Node) -> Place:
        a = self._read(source)
        slopes: Place | None = None
        if kind is Kind.CURVED:  # four numbers a channel
            slopes = self._place(2 * out.size)
        if node.target is module_activation:
            return self._written(kind, out, a, slopes, module=_index(self.modules, node.args[0]))
        found = setting_of(node, self.values)
        if type(found) is float:
            return self._written(kind, out, a, number=found)
        assert type(found) is tuple
        return self._written(kind, out, a, slopes, curve=found)

    def _joined(self, node: Node) -> Place:
        parts, dim = node.args
        sizes = [s[dim] for s in node.kwargs["in_shapes"]]
        whole = self._place(sum(sizes))
        pieces, start = [], 0
        for part, size in zip(parts, sizes, strict=True):
            piece = Place(whole.mean + start, whole.var + start, size)
            pieces.append(self._written(Kind.COPIED, piece, self._read(part)))
            start += size
        self.joins.append((whole, tuple(pieces)))
        return whole

    def _read(self, node: Node) -> Place:
        """Where the moments of a node are; those that others give are loaded."""
        if node not in self.places:
            out = self._place(shape_of(self.values[node]).numel())
            self.places[node] = self._written(Kind.GIVEN, out, source=_index(self.given, node))
        return self.places[node]

    def _place(self, size: int) -> Place:
        self.size += 2 * size
        return Place(self.size - 2 * size, self.size - size, size)

    def _written(self, kind: Kind, out: Place, a: Place | None = None, b: Place | None = None, **options: Any) -> Place:
        self.steps.append(Step(kind, out, a, b, **options))
        return out


def _map(module: Any) -> Map:
    return Map(tuple(module.weight.shape), getattr(module, "groups", 1), module.bias is not None)


def _index(known: dict[Node, int], node: Node) -> int:
    return known.setdefault(node, len(known))
