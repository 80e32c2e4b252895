"""Which operations of a moment lane one compiled call can do together."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normprop.activations.compiled_curves import native_curve
from normprop.channel_moments import Moments
from normprop.conversion.activation_setting import Setting, module_setting, named_setting
from normprop.conversion.compiled_segment import run_segment
from normprop.conversion.segment import Kind, Map, Place, Scaling, Segment, Step
from normprop.graph.node import Node, map_nodes, placed
from normprop.graph.node import run as run_target
from normprop.precision import reference_tensor
from normprop.rules import arithmetic, combine, linear, pooling, reduction, shape
from normprop.rules.elementwise import module_activation, named_activation, named_parameters
from normprop.sites import site as sites
from normprop.sites.rows import Form
from normprop.sites.site import site_moments, site_scales

# Rules after which every element has the moments that it had.
_SAME = (shape.same, shape.same_module, shape.reshape, shape.reshape_module, shape.squeeze, shape.expand, shape.move)
# Rules that multiply mean and variance by one number each; k and c, where those of the result are k m and c v.
_AVERAGES = (
    pooling.average_pool, pooling.functional_average_pool, pooling.adaptive_average_pool,
    pooling.functional_adaptive_average_pool, reduction.mean, reduction.total,
)  # fmt: skip
# Rules after which the mean is m + k√v, and the variance c v.
_LARGEST = (
    pooling.max_pool, pooling.functional_max_pool, pooling.adaptive_max_pool, pooling.functional_adaptive_max_pool,
    reduction.amax,
)  # fmt: skip
_MAPS = (linear.convolution, linear.linear)


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

    def call(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The one call: it returns an entry per node."""
        return run_segment, (self.segment, *map(tuple, self.arguments)), {}


def segment_groups(
    nodes: Sequence[Node], outputs: Sequence[Node], root: nn.Module, limit: int
) -> tuple[list[SegmentGroup], dict[Node, int]]:
    """Groups for all nodes that segments can hold, and of every node how many segments and runs of others come before it.

    Args:
        nodes: of a lane, each behind what it reads.
        outputs: nodes whose values are wanted.
        root: the network, with values: the lane is run once.
        limit: weights of one segment; beyond, a site costs more than its calls, and gradients had better not wait.
    """
    values = _values(nodes, root)
    held = {node for node in nodes if _is_held(node, values)}
    level = _levels(nodes, held)
    readers: dict[Node, set[Node]] = {}
    for node in nodes:
        for source in node.inputs:
            readers.setdefault(source, set()).add(node)
    wanted = set(outputs)

    def laid(some: Sequence[Node]) -> SegmentGroup:
        inside = set(some)
        return _Layout(some, values, {n for n in some if n in wanted or readers.get(n, set()) - inside}).group()

    groups: list[SegmentGroup] = []
    for number in sorted({level[node] for node in held}):
        here = [node for node in nodes if node in held and level[node] == number]
        flow = [node for node in here if node.target is not site_scales]
        chunks = list(_chunks([node for node in here if node.target is site_scales], root, limit))
        if len(chunks) <= 1:
            groups.append(laid(here))
            continue
        if flow:
            groups.append(laid(flow))
        groups += map(laid, chunks)
    return [group for group in groups if group.reads()], level  # nothing but a standardised input is left to torch


def _chunks(scalings: Sequence[Node], root: nn.Module, limit: int) -> Iterator[list[Node]]:
    together: list[Node] = []
    size = 0
    for node in scalings:
        weight = node.args[0][0]
        numbers = 0 if weight is None else operator.attrgetter(weight.target)(root).numel()
        if together and size + numbers > limit:
            yield together
            together, size = [], 0
        together.append(node)
        size += numbers
    if together:
        yield together


def _levels(nodes: Sequence[Node], held: set[Node]) -> dict[Node, int]:
    """Nodes of one level that segments hold read none of each other but through those on the same side."""
    level: dict[Node, int] = {}
    for node in nodes:
        inside = node in held
        moments = [n for n in node.inputs if n.op == "call"]
        level[node] = max((level[n] + ((n in held) != inside and (inside or n in held)) for n in moments), default=0)
    return level


@torch.no_grad()
def _values(nodes: Sequence[Node], root: nn.Module) -> dict[Node, Any]:
    """What nodes give with the network's present parameters, scales aside."""
    values: dict[Node, Any] = {}
    for node in nodes:
        if node.op == "module":
            values[node] = root.get_submodule(node.target)
        elif node.op == "tensor":
            parent, _, name = node.target.rpartition(".")
            holder = root.get_submodule(parent)
            values[node] = (
                holder._parameters.get(name) if holder._parameters.get(name) is not None else getattr(holder, name)
            )
        elif node.op == "constant":
            values[node] = node.target
        elif node.target is not site_scales:
            args, kwargs = placed(map_nodes((node.args, node.kwargs), values.__getitem__), reference_tensor(root).device)
            found = run_target(node.target, args, kwargs)
            values[node] = found[0] if node.target is site_moments else found
    return values


def _vector(moments: Any) -> tuple[int, int] | None:
    """Along which dimension moments vary, and how many there are; None if along several."""
    if type(moments) is not Moments:
        return None
    full = _shape(moments)
    varying = [d for d, size in enumerate(full) if size != 1]
    return (varying[0] if varying else -1, full.numel()) if len(varying) <= 1 else None


def _is_held(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a segment can hold a node."""
    if node.op != "call":
        return False
    if node.target is site_scales:
        weight, site, moments, options = node.args[0]
        return moments is None or _fits_site(values[moments], values.get(weight), values[site], options)
    if _vector(values[node]) is None or values[node].mean.dtype not in (torch.float32, torch.float64):
        return False
    return _kind(node, values) is not None


def _fits_site(moments: Any, weight: Tensor | None, site: Any, options: Any) -> bool:
    """Whether moments vary along the channels that a site reads, if at all."""
    found = _vector(moments)
    if found is None:
        return False
    count = site.num_features
    if weight is not None:
        count = weight.shape[0] if options.get("transposed_stride") else weight.shape[1] * options.get("groups", 1)
    dim, size = found
    return size == 1 or (size == count and dim == options["channel"] % moments.mean.dim())


def _kind(node: Node, values: dict[Node, Any]) -> Kind | None:
    """What a node is for a segment, if it can hold it."""
    target = node.target
    sources = [n for n in node.inputs if isinstance(values.get(n), Moments)]
    if any(_vector(values[n]) is None for n in sources):
        return None
    if target is sites.standard_normal:
        return Kind.STANDARD
    if target is site_moments:
        return Kind.SITE
    if target in (module_activation, named_activation):
        known = _setting(node, values)
        return None if known is None else Kind.RECTIFIED if type(known) is float else Kind.CURVED
    if target in _MAPS:
        return Kind.MAPPED if _is_map(node, values, sources) else None
    if len(sources) == 1 and _shape(values[node]).numel() == _shape(values[sources[0]]).numel():
        if target in _SAME:
            return Kind.COPIED
        if target in _AVERAGES:
            return Kind.SCALED
        if target in _LARGEST:
            return Kind.LARGEST
    if getattr(target, "__name__", "") == "detached" and len(sources) == 1:
        return Kind.DETACHED
    if target in (arithmetic.add, arithmetic.sub):
        return _sum(node, sources)
    if target is arithmetic.mul:
        return _product(node, sources)
    if target is combine.cat and _is_joined(node, values):
        return Kind.READ  # its parts are copied to where it is
    return None


def _setting(node: Node, values: dict[Node, Any]) -> Setting | None:
    """Which rectifier or compiled activation a node is, if it is one."""
    if node.target is module_activation:
        found = module_setting(values[node.args[0]])
    elif len(node.inputs) != 1 or not isinstance(values[node.inputs[0]], Moments):
        return None
    else:
        name, parameters, source, *rest = node.args
        found = named_setting(name, named_parameters(name, parameters, values[source], *rest, **node.kwargs))
    if type(found) is tuple and native_curve(*found, True) is None:
        return None
    return found


def _is_map(node: Node, values: dict[Node, Any], sources: Sequence[Node]) -> bool:
    """Whether a linear layer reads moments that vary along its channels, if at all."""
    module = values[node.args[0]]
    if len(node.args) != 2 or node.kwargs or len(sources) != 1 or not isinstance(module.weight, Tensor):
        return False
    dims = module.weight.dim() - 2
    found = _vector(values[sources[0]])
    assert found is not None
    count = module.weight.shape[1] * getattr(module, "groups", 1)
    return found[1] == 1 or found == (values[sources[0]].mean.dim() - 1 - dims, count)


def _factors(node: Node, source: Node, values: dict[Node, Any]) -> tuple[float, float]:
    """Mean and variance that a node makes of 1 and 1 if it is an average, of 0 and 1 if it is a maximum."""
    like = values[source].mean
    ones = like.new_ones(like.shape, dtype=torch.float64)
    given = values | {source: Moments(ones if node.target in _AVERAGES else torch.zeros_like(ones), ones)}
    args, kwargs = placed(map_nodes((node.args, node.kwargs), given.__getitem__), like.device)
    found = run_target(node.target, args, kwargs)
    return float(found.mean.flatten()[0]), float(found.var.flatten()[0])


def _sum(node: Node, sources: Sequence[Node]) -> Kind | None:
    if len(node.args) != 2 or set(node.kwargs) - {"alpha"}:
        return None
    if len(sources) == 2 and node.args[0] is not node.args[1]:
        return Kind.SUM
    return Kind.SCALED if len(sources) == 1 and node.args[0] is node.args[1] and node.target is arithmetic.add else None


def _product(node: Node, sources: Sequence[Node]) -> Kind | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    if len(sources) == 2:
        return Kind.PRODUCT
    numbers = [a for a in node.args if type(a) in (int, float)]
    return Kind.SCALED if len(sources) == 1 and len(numbers) == 1 else None


def _is_joined(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a concatenation joins channels, one part behind the other."""
    if len(node.args) != 2 or not isinstance(node.args[0], tuple | list):
        return False
    parts, dim = node.args
    shapes = node.kwargs["in_shapes"]
    rank = len(node.kwargs["out_shape"])
    if len(shapes) != len(parts) or not all(isinstance(p, Node) and isinstance(values.get(p), Moments) for p in parts):
        return False
    if any(_vector(values[p]) not in ((dim % rank, s[dim]), (-1, 1)) for p, s in zip(parts, shapes, strict=True)):
        return False
    return bool(dim % rank != 0)


class _Layout:
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
        exports = [(self.places[n], tuple(_shape(self.values[n]))) for n in exported]
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
        form = Form(options.get("groups", 1), stride > 0, max(stride, 1), self.values[site].center and weight is not None)
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
        kind = _kind(node, self.values)
        size = _shape(self.values[node]).numel()
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
        if kind is not None and (kind is Kind.LARGEST or node.target in _AVERAGES):
            number, other = _factors(node, sources[0], self.values)
            return self._written(kind, out, self._read(sources[0]), number=number, other=other)
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
        found = _setting(node, self.values)
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
            out = self._place(_shape(self.values[node]).numel())
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


def _shape(moments: Moments) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(moments.mean.shape, moments.var.shape)
    return shape
