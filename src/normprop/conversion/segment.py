"""Part of a moment lane as one compiled call: what moments become between sites, and then the scales of sites."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normprop.activations.rectifier_moments import rectified_moments
from normprop.channel_moments import Moments
from normprop.double_backward import gradients_again
from normprop.errors import NormPropError
from normprop.native.library import NativeLayout, library
from normprop.native.operands import handles
from normprop.native.structures import MomentOperation, SiteScaling
from normprop.precision import full_precision, wide
from normprop.rules.elementwise import module_slope
from normprop.sites.c_engine import Layer, geometry
from normprop.sites.engine import scales
from normprop.sites.reference import Scale, plain_scale
from normprop.sites.rows import Form, Operands, to_rows
from normprop.sites.site import Site, site_tensors

_DERIVED = ("layouts", "readers", "widths", "_sources")


class Kind(IntEnum):
    """What an operation does; the order is that of moments.c."""

    STANDARD, GIVEN, SITE, RECTIFIED, SUM, PRODUCT, SCALED, COPIED, DETACHED, READ = range(10)


class Place(NamedTuple):
    """Where in memory the means and variances of a tensor are, and how many."""

    mean: int
    var: int
    size: int


@dataclass(frozen=True)
class Step:
    """One operation on moments.

    Attributes:
        kind: what it does. READ stands for somebody who reads `out`: a gradient arrives there.
        out: where its result is.
        a: its first argument.
        b: its second argument.
        source: GIVEN: which of the given moments; SITE: which site; READ: which export.
        number: RECTIFIED: slope below zero; SUM: factor of b; SCALED: factor.
        module: RECTIFIED: which module knows the slope, None for `number`.
    """

    kind: Kind
    out: Place
    a: Place | None = None
    b: Place | None = None
    source: int = -1
    number: float = 0.0
    module: int | None = None


@dataclass(frozen=True)
class Scaling:
    """One scale of one site.

    Attributes:
        site: which of the sites.
        weight: which of the weights; None for a site without a layer.
        shape: of that weight.
        place: moments of the layer's input, or of what the site normalises; None for standardised input.
        form: of the layer.
        call: which of the site's calls.
    """

    site: int
    weight: int | None
    shape: tuple[int, ...]
    place: Place | None
    form: Form
    call: int


class Found(NamedTuple):
    """What a run finds in the network beside what has gradients.

    Attributes:
        forms: of each scaling.
        constants: d, k and U of each scaling, one behind the other.
        slopes: of the modules.
    """

    forms: tuple[Form, ...]
    constants: tuple[Tensor | None, ...]
    slopes: tuple[float, ...]


class Parts(NamedTuple):
    """Tensors that have gradients, by what they are."""

    weights: Sequence[Tensor]
    gammas: Sequence[Tensor]
    betas: Sequence[Tensor]
    means: Sequence[Tensor]
    variances: Sequence[Tensor]


@dataclass(frozen=True)
class Segment:
    """Operations on moments, then scales of sites; no operation reads a scale.

    Attributes:
        steps: in order.
        scalings: the sites whose scales are wanted.
        exports: moments that are read elsewhere, with their shapes.
        joins: places that others make up, with these.
        size: of the memory that all moments lie in.
        channels: of each site.
        given: numbers of mean and variance of each of the given moments.
        weights: how many.
    """

    steps: tuple[Step, ...]
    scalings: tuple[Scaling, ...]
    exports: tuple[tuple[Place, tuple[int, ...]], ...]
    joins: tuple[tuple[Place, tuple[Place, ...]], ...]
    size: int
    channels: tuple[int, ...]
    given: tuple[tuple[int, int], ...]
    weights: int

    def __call__(
        self, weights: Sequence[Tensor], sites: Sequence[Site], modules: Sequence[nn.Module], given: Sequence[Moments]
    ) -> list[Any]:
        """A `Scale` for every scaling, then `Moments` for every export."""
        weights = [wide(w) for w in weights]
        pairs: list[Any] = [None] * len(sites)
        forms: list[Form] = []
        constants: list[Tensor | None] = []
        for s in self.scalings:
            site, form = sites[s.site], s.form
            if s.weight is not None and site.center is not form.center:
                form = Form(form.groups, form.transposed, form.stride, site.center)
            forms.append(form)
            weight = None if s.weight is None else weights[s.weight]
            gamma, beta, shift, scale, directions = site_tensors(site, s.call, weight)
            pairs[s.site] = gamma, beta
            constants += shift.contiguous(), scale.contiguous(), directions
        pairs = [pair or site_tensors(site, 0, None)[:2] for pair, site in zip(pairs, sites, strict=True)]
        slopes = tuple(0.0 if type(m) is nn.ReLU else _slope(m) for m in modules)
        found = Found(tuple(forms), tuple(constants), slopes)
        parts = Parts(
            weights,
            [gamma.contiguous() for gamma, _ in pairs],
            [beta.contiguous() for _, beta in pairs],
            [wide(m.mean).contiguous() for m in given],
            [wide(m.var).contiguous() for m in given],
        )
        flat = self._run(found, parts)
        count = 3 * len(self.scalings)
        results: list[Any] = [Scale(*flat[i : i + 3]) for i in range(0, count, 3)]
        results += [Moments(*flat[i : i + 2]) for i in range(count, len(flat), 2)]
        return results

    def _run(self, found: Found, parts: Parts) -> Sequence[Any]:
        tensors = [t for part in parts for t in part]
        if self._fits(parts) and handles((*tensors, *found.constants), tensors[-1].dtype):
            flat: Sequence[Any] = _Compiled.apply(self, found, *tensors)
            return flat
        with full_precision(tensors[0]):
            return self.plain(found, parts, fast=True)

    def _fits(self, parts: Parts) -> bool:
        """Whether tensors have the sizes for which the segment was laid out."""
        weights = (s.weight is None or parts.weights[s.weight].shape == s.shape for s in self.scalings)
        sites = (g.numel() == b.numel() == n for g, b, n in zip(parts.gammas, parts.betas, self.channels, strict=True))
        given = (
            (m.numel(), v.numel()) == sizes for m, v, sizes in zip(parts.means, parts.variances, self.given, strict=True)
        )
        return all(weights) and all(sites) and all(given)

    def parts(self, tensors: Sequence[Any]) -> Parts:
        """What lies one behind the other."""
        found, start = [], 0
        for count in (self.weights, len(self.channels), len(self.channels), len(self.given), len(self.given)):
            found.append(tensors[start : start + count])
            start += count
        return Parts(*found)

    def layout(self, key: LayoutKey) -> NativeLayout:
        """The segment as C reads it."""
        if key not in self.layouts:
            self.layouts[key] = _laid(self, key)
        return self.layouts[key]

    @functools.cached_property
    def readers(self) -> list[int]:
        """For each weight a scaling that reads it."""
        return [next(i for i, s in enumerate(self.scalings) if s.weight == w) for w in range(self.weights)]

    @functools.cached_property
    def widths(self) -> list[int]:
        """Channels of each scaling."""
        return [self.channels[s.site] for s in self.scalings]

    @functools.cached_property
    def _sources(self) -> list[tuple[set[int], set[int]]]:
        """For each scaling, then each export, the sites and given moments that it depends on, those detached aside."""
        made: dict[Place, tuple[set[int], set[int]]] = {}
        joins = dict(self.joins)
        for step in self.steps:
            if step.kind is Kind.READ:
                continue
            before = [] if step.kind is Kind.DETACHED else [p for p in (step.a, step.b) if p is not None]
            before = [q for p in before for q in (p,) * (p in made) + joins.get(p, ()) * (p not in made)]
            sites, given = (set().union(*(made[p][k] for p in before)) for k in (0, 1))
            sites |= {step.source} if step.kind is Kind.SITE else set()
            given |= {step.source} if step.kind is Kind.GIVEN else set()
            made[step.out] = sites, given
        for place, parts in self.joins:
            made[place] = tuple(set().union(*(made[p][k] for p in parts)) for k in (0, 1))  # type: ignore[assignment]
        found = [made[s.place] if s.place is not None else (set[int](), set[int]()) for s in self.scalings]
        found = [(sites | {s.site}, given) for s, (sites, given) in zip(self.scalings, found, strict=True)]
        return [*found, *(made[place] for place, _ in self.exports)]

    def asked(self, grads: Sequence[Tensor | None]) -> tuple[set[int], set[int]]:
        """The sites and given moments that gradients arrive at."""
        count = 3 * len(self.scalings)
        arrive = [any(g is not None for g in grads[i : i + 3]) for i in range(0, count, 3)]
        arrive += [any(g is not None for g in grads[i : i + 2]) for i in range(count, len(grads), 2)]
        if all(arrive):
            return set(range(len(self.channels))), set(range(len(self.given)))
        known = [source for source, here in zip(self._sources, arrive, strict=True) if here]
        return set().union(*(sites for sites, _ in known)), set().union(*(given for _, given in known))

    @functools.cached_property
    def layouts(self) -> dict[LayoutKey, NativeLayout]:
        """Those that were made."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """All but what is derived."""
        return {name: value for name, value in vars(self).items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def operands(self, found: Found, parts: Parts, moments: Sequence[tuple[Any, Any]]) -> list[Operands]:
        """What the arithmetic of the sites takes."""
        result = []
        for i, (s, both) in enumerate(zip(self.scalings, moments, strict=True)):
            weight = None if s.weight is None else parts.weights[s.weight]
            shift, scale, directions = found.constants[3 * i : 3 * i + 3]
            assert shift is not None
            assert scale is not None
            result.append(Operands(weight, *both, parts.gammas[s.site], parts.betas[s.site], shift, scale, directions))
        return result

    def plain(self, found: Found, parts: Parts, *, fast: bool = False) -> list[Tensor | None]:
        """The same in torch's operations.

        Args:
            found: in the network.
            parts: tensors that have gradients.
            fast: with the scales of whichever engine fits, else with those that can be differentiated again.
        """
        values: dict[Place, Moments] = {}
        joins = dict(self.joins)

        def read(place: Place | None) -> Moments:
            assert place is not None
            if place in joins and place not in values:
                pieces = [values[p] for p in joins[place]]
                values[place] = Moments(torch.cat([p.mean for p in pieces]), torch.cat([p.var for p in pieces]))
            return values[place]

        for step in self.steps:
            if step.kind is not Kind.READ:
                result = self._moved(step, read, found, parts)
                values[step.out] = result.expanded((step.out.size,))
        given = [(None, None) if s.place is None else (read(s.place).mean, read(s.place).var) for s in self.scalings]
        operands = self.operands(found, parts, given)
        some = scales(found.forms, operands) if fast and operands else map(plain_scale, found.forms, operands)
        flat: list[Tensor | None] = [t for scale in some for t in scale]
        for place, shape in self.exports:
            flat += read(place).mean.reshape(shape), read(place).var.reshape(shape)
        return flat

    @staticmethod
    def _moved(step: Step, read: Any, found: Found, parts: Parts) -> Moments:
        """What one step gives, in torch's operations."""
        match step.kind:
            case Kind.STANDARD:
                like = next(t for some in parts for t in some)
                return Moments(like.new_zeros(1), like.new_ones(1))
            case Kind.GIVEN:
                return Moments(parts.means[step.source].reshape(-1), parts.variances[step.source].reshape(-1))
            case Kind.SITE:
                return Moments(parts.betas[step.source], parts.gammas[step.source].square())
            case Kind.RECTIFIED:
                slope = step.number if step.module is None else found.slopes[step.module]
                return Moments(*rectified_moments(read(step.a).mean, read(step.a).var, slope))
            case Kind.SUM:
                result: Moments = read(step.a).plus(read(step.b).scaled(step.number))
            case Kind.PRODUCT:
                result = read(step.a).times(read(step.b))
            case Kind.SCALED:
                result = read(step.a).scaled(step.number)
            case Kind.DETACHED:
                result = Moments(read(step.a).mean.detach(), read(step.a).var.detach())
            case _:
                result = read(step.a)
        return result


def _slope(module: nn.Module) -> float:
    """The slope of a rectifier below zero.

    Raises:
        NormPropError: it has become something else.
    """
    slope = module_slope(module)
    if slope is None:
        raise NormPropError(f"the slope of a {type(module).__name__} is no number any more.\nConvert again.")
    return slope


class LayoutKey(NamedTuple):
    """What a layout depends on beside the segment.

    Attributes:
        threads: that share the work.
        forms: of the layers.
        ranks: directions of each scaling, over all groups.
        outside: whether the taps of each weight's filters lie outside their inputs in memory; nothing for nowhere.
        slopes: of the modules.
    """

    threads: int
    forms: tuple[Form, ...]
    ranks: tuple[int, ...]
    outside: tuple[bool, ...]
    slopes: tuple[float, ...]


def _laid(segment: Segment, key: LayoutKey) -> NativeLayout:
    """A segment as C reads it. Tensors are numbered as `Parts` has them, then d, k and U of each scaling."""
    weights, sites, given = segment.weights, len(segment.channels), len(segment.given)
    operations = (MomentOperation * len(segment.steps))()
    for o, step in zip(operations, segment.steps, strict=True):
        o.kind, o.size, o.number = step.kind, step.out.size, step.number
        o.mean, o.var = step.out.mean, step.out.var
        if step.a is not None:
            o.a_mean, o.a_var, o.a_size = step.a
        if step.b is not None:
            o.b_mean, o.b_var, o.b_size = step.b
        if step.module is not None:
            o.number = key.slopes[step.module]
        if step.kind is Kind.GIVEN:
            o.a_size, o.b_size = segment.given[step.source]
            o.first, o.second = weights + 2 * sites + step.source, weights + 2 * sites + given + step.source
        elif step.kind is Kind.SITE:
            o.first, o.second = weights + step.source, weights + sites + step.source
        elif step.kind is Kind.READ:
            at = 3 * len(segment.scalings) + 2 * step.source
            o.first, o.second = at, at + 1
    scalings = (SiteScaling * len(segment.scalings))()
    column = numbers = 0
    first = weights + 2 * (sites + given)
    for i, (c, s) in enumerate(zip(scalings, segment.scalings, strict=True)):
        size = segment.channels[s.site]
        outside = s.weight is not None and bool(key.outside) and key.outside[s.weight]
        laid = geometry(key.forms[i], size, s.shape, outside, key.threads, key.ranks[i])
        c.weight = -1 if s.weight is None else s.weight
        c.gamma, c.beta, c.shift, c.scale = weights + s.site, weights + sites + s.site, first + 3 * i, first + 3 * i + 1
        c.directions = first + 3 * i + 2 if key.ranks[i] else -1
        c.mean, c.var = (-1, -1) if s.place is None else s.place[:2]
        c.column = column
        c.groups, c.filters, c.inputs, c.taps, c.taps_first, c.stride, c.center, c.blocks, c.rank = laid.fields
        column += size
        numbers += laid.numbers
    return NativeLayout(operations, scalings, column, numbers)


class _Frame:
    """Tensors of a segment as C reads them.

    Args:
        segment: the segment.
        found: in the network.
        parts: tensors that have gradients.

    Attributes:
        rows: weights as filters one behind the other in memory, of those that don't lie so themselves.
        read: addresses of all tensors.
        layout: of the segment.
    """

    def __init__(self, segment: Segment, found: Found, parts: Parts) -> None:
        self.alive: list[Tensor] = []
        self.rows: dict[int, Layer] = {}
        self.read: list[int] = []
        for i, (weight, reader) in enumerate(zip(parts.weights, segment.readers, strict=True)):
            if found.forms[reader].transposed or not weight.is_contiguous():
                self.rows[i] = Layer(weight, found.forms[reader])
                weight = self.rows[i].memory
            self.read.append(weight.data_ptr())
        self.read += [t.data_ptr() for some in parts[1:] for t in some]
        ranks = []
        for i, s in enumerate(segment.scalings):
            shift, scale, directions = found.constants[3 * i : 3 * i + 3]
            assert shift is not None
            assert scale is not None
            rank, address = 0, 0
            if directions is not None and s.weight is not None:
                rank = len(directions)
                if s.weight in self.rows or not directions.is_contiguous():
                    directions = to_rows(directions, found.forms[i], like=parts.weights[s.weight]).contiguous()
                    self.alive.append(directions)
                address = directions.data_ptr()
            ranks.append(rank)
            self.read += shift.data_ptr(), scale.data_ptr(), address
        outside = tuple(i in self.rows and self.rows[i].outside for i in range(len(parts.weights))) if self.rows else ()
        self.layout = segment.layout(LayoutKey(torch.get_num_threads(), found.forms, tuple(ranks), outside, found.slopes))

    def empty(self, index: int, weight: Tensor) -> Tensor:
        """Memory for another weight that lies as one does."""
        return self.rows[index].empty() if index in self.rows else torch.empty_like(weight)

    def laid(self, index: int, grad: Tensor) -> Tensor:
        """A gradient that lies as a weight does."""
        if index in self.rows:
            return self.rows[index].laid(grad)
        return grad if grad.is_contiguous() else grad.contiguous()

    def shaped(self, index: int, memory: Tensor) -> Tensor:
        """Such memory in the weight's shape."""
        return self.rows[index].shaped(memory) if index in self.rows else memory

    def address(self, tensor: Tensor | None) -> int:
        """Where the numbers of a tensor are, one behind the other; 0 for none."""
        if tensor is None:
            return 0
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self.alive.append(tensor)
        return tensor.data_ptr()


class _Compiled(torch.autograd.Function):
    """A segment in compiled arithmetic. Differentiated again, the backward is that of `Segment.plain`."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, found: Found, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        ctx.segment, ctx.forms, ctx.slopes = segment, found.forms, found.slopes
        ctx.set_materialize_grads(False)
        parts = segment.parts(tensors)
        frame = _Frame(segment, found, parts)
        layout = frame.layout
        memory, columns = tensors[-1].new_empty(segment.size), tensors[-1].new_empty(5, layout.channels)
        filters = [None if s.weight is None else frame.empty(s.weight, parts.weights[s.weight]) for s in segment.scalings]
        native = library()
        assert not isinstance(native, str)
        into = [0 if t is None else t.data_ptr() for t in filters]
        native.lane(memory.dtype, layout, frame.read, into, memory.data_ptr(), columns.data_ptr())
        factors, offsets, *_ = (row.split(segment.widths) for row in columns.unbind())
        outputs: list[Tensor | None] = []
        for s, multiplied, f, b in zip(segment.scalings, filters, factors, offsets, strict=True):
            if s.weight is None or multiplied is None:
                outputs += None, f, b
            else:
                outputs += frame.shaped(s.weight, multiplied), None, b
        for place, shape in segment.exports:
            outputs += (memory[at : at + place.size].view(shape) for at in (place.mean, place.var))
        ctx.save_for_backward(*tensors, *found.constants, memory, columns)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        segment = ctx.segment
        *saved, memory, columns = ctx.saved_tensors
        constants = len(saved) - 3 * len(segment.scalings)
        tensors = saved[:constants]
        found, parts = Found(ctx.forms, tuple(saved[constants:]), ctx.slopes), segment.parts(tensors)
        if torch.is_grad_enabled():
            return (None, None, *gradients_again(lambda t: segment.plain(found, segment.parts(t)), tensors, grads))
        needs = ctx.needs_input_grad[2:]
        return (None, None, *_gradients(segment, found, parts, memory, columns, grads, needs))


def _gradients(
    segment: Segment,
    found: Found,
    parts: Parts,
    memory: Tensor,
    columns: Tensor,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of weights, γ, β, and of given means and variances.

    That of a weight is written into what its filters got, which is nobody else's.
    """
    frame = _Frame(segment, found, parts)
    given: list[int] = []
    by_filters: list[Tensor | None] = []
    for i, s in enumerate(segment.scalings):
        by_multiplied, *others = grads[3 * i : 3 * i + 3]
        into = None
        if s.weight is not None and (by_multiplied is not None or others[1] is not None):
            if by_multiplied is not None:
                by_multiplied = frame.laid(s.weight, by_multiplied)
                frame.alive.append(by_multiplied)
            if needs[s.weight]:
                into = by_multiplied if by_multiplied is not None else frame.empty(s.weight, parts.weights[s.weight])
        given.append(0 if by_multiplied is None else by_multiplied.data_ptr())
        given += map(frame.address, others)
        by_filters.append(into)
    given += map(frame.address, grads[3 * len(segment.scalings) :])
    sizes = [t.numel() for some in parts[1:] for t in some]
    rest = memory.new_zeros(sum(sizes)).split(sizes)
    native = library()
    assert not isinstance(native, str)
    native.lane_gradients(
        memory.dtype,
        frame.layout,
        frame.read,
        given,
        [0 if t is None else t.data_ptr() for t in by_filters],
        [0] * segment.weights + [t.data_ptr() for t in rest] + [0] * len(found.constants),
        (memory.data_ptr(), segment.size),
        columns.data_ptr(),
    )
    by_weights: list[Tensor | None] = [None] * segment.weights
    for s, one in zip(segment.scalings, by_filters, strict=True):
        if s.weight is not None and one is not None:
            shaped, other = frame.shaped(s.weight, one), by_weights[s.weight]
            by_weights[s.weight] = shaped if other is None else other + shaped
    shapes = (t.shape for some in parts[1:] for t in some)
    shaped_rest = [g if g.shape == shape else g.view(shape) for g, shape in zip(rest, shapes, strict=True)]
    sites, moments = segment.asked(grads)
    count, more = len(segment.channels), len(segment.given)
    reached = [i in sites for i in range(count)] * 2 + [i in moments for i in range(more)] * 2
    return [*by_weights, *(g if here else None for g, here in zip(shaped_rest, reached, strict=True))]
