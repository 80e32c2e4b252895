"""Part of a moment lane as data: what moments become between sites, and then the scales of sites."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from normprop.activations.compiled_curves import native_curve
from normprop.activations.fast_moments import lane_moments
from normprop.activations.rectifier_moments import rectified_moments
from normprop.channel_moments import Moments
from normprop.conversion.activation_setting import Setting
from normprop.native.library import NativeLayout
from normprop.rules.linear import weight_moments
from normprop.sites.engine import scales
from normprop.sites.reference import plain_scale
from normprop.sites.rows import Form, Operands
from normprop.sites.site import widened

_DERIVED = ("layouts", "readers", "readings", "spans", "widths", "_forms", "_sources")


class Kind(IntEnum):
    """What an operation does; the order is that of moments.h."""

    STANDARD, GIVEN, SITE, RECTIFIED, SUM, PRODUCT, SCALED, COPIED, DETACHED, READ, CURVED, MAPPED, LARGEST, WIDENED = range(
        14
    )


# What reads tensors that have gradients.
_READERS = (Kind.SITE, Kind.GIVEN, Kind.MAPPED)


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
        source: GIVEN: which of the given moments; SITE: which site; READ: which export; MAPPED: which map.
        number: RECTIFIED: slope below zero; SUM: factor of b; SCALED: factor of the mean; LARGEST: how many standard
            deviations the mean moves.
        other: SCALED, LARGEST: factor of the variance; WIDENED: what is added to it.
        module: RECTIFIED, CURVED: which module knows the slope, or the activation; None for `number`, or `curve`.
        curve: CURVED: the activation, by its name and parameters.
    """

    kind: Kind
    out: Place
    a: Place | None = None
    b: Place | None = None
    source: int = -1
    number: float = 0.0
    other: float = 0.0
    module: int | None = None
    curve: Setting = ("", ())


class Map(NamedTuple):
    """A linear layer without a site, which moments flow through.

    Attributes:
        shape: of its weight.
        groups: of a grouped convolution.
        offset: whether it has a bias.
    """

    shape: tuple[int, ...]
    groups: int
    offset: bool


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
        settings: of the modules: the slope of a rectifier, else name and parameters of the activation.
    """

    forms: tuple[Form, ...]
    constants: tuple[Tensor | None, ...]
    settings: tuple[Setting, ...]


class Parts(NamedTuple):
    """Tensors that have gradients, by what they are; of maps, the weight and then the bias or None of each."""

    weights: Sequence[Tensor]
    gammas: Sequence[Tensor]
    betas: Sequence[Tensor]
    means: Sequence[Tensor]
    variances: Sequence[Tensor]
    maps: Sequence[Tensor | None]

    @property
    def like(self) -> Tensor:
        """One of them: all have one dtype and device."""
        return next(t for part in self for t in part if t is not None)

    @property
    def beside_weights(self) -> list[Tensor | None]:
        """All but weights of layers with a site."""
        return [t for part in self[1:] for t in part]

    @property
    def sizes(self) -> list[int]:
        """Numbers of each of these."""
        return [0 if t is None else t.numel() for t in self.beside_weights]


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
        maps: linear layers without a site.
    """

    steps: tuple[Step, ...]
    scalings: tuple[Scaling, ...]
    exports: tuple[tuple[Place, tuple[int, ...]], ...]
    joins: tuple[tuple[Place, tuple[Place, ...]], ...]
    size: int
    channels: tuple[int, ...]
    given: tuple[tuple[int, int], ...]
    weights: int
    maps: tuple[Map, ...]

    def parts(self, tensors: Sequence[Any]) -> Parts:
        """What lies one behind the other."""
        found, start = [], 0
        sites, given = len(self.channels), len(self.given)
        for count in (self.weights, sites, sites, given, given, 2 * len(self.maps)):
            found.append(tensors[start : start + count])
            start += count
        return Parts(*found)

    def forms(self, centers: tuple[float, ...]) -> tuple[Form, ...]:
        """Of each scaling, with filters centred as far as the network has them now."""
        found = self._forms.get(centers)
        if found is None:
            forms = (s.form._replace(center=center) for s, center in zip(self.scalings, centers, strict=True))
            found = self._forms.setdefault(centers, tuple(forms))
        return found

    @functools.cached_property
    def _forms(self) -> dict[tuple[float, ...], tuple[Form, ...]]:
        return {}

    def fits(self, settings: Sequence[Setting], parts: Parts) -> bool:
        """Whether tensors have the sizes for which this was laid out, and activations are compiled ones."""
        weights = (s.weight is None or parts.weights[s.weight].shape == s.shape for s in self.scalings)
        sites = (g.numel() == b.numel() == n for g, b, n in zip(parts.gammas, parts.betas, self.channels, strict=True))
        given = (
            (m.numel(), v.numel()) == sizes for m, v, sizes in zip(parts.means, parts.variances, self.given, strict=True)
        )
        maps = (
            weight is not None and weight.shape == m.shape and (bias is not None) is m.offset
            for m, weight, bias in zip(self.maps, parts.maps[::2], parts.maps[1::2], strict=True)
        )
        curves = (isinstance(setting, float) or native_curve(*setting, True) is not None for setting in settings)
        return all(weights) and all(sites) and all(given) and all(maps) and all(curves)

    @functools.cached_property
    def readers(self) -> list[int]:
        """For each weight a scaling that reads it."""
        return [next(i for i, s in enumerate(self.scalings) if s.weight == w) for w in range(self.weights)]

    @functools.cached_property
    def widths(self) -> list[int]:
        """Channels of each scaling."""
        return [self.channels[s.site] for s in self.scalings]

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Where the channels of each scaling begin and end, those of all one behind the other."""
        ends = list(itertools.accumulate(self.widths))
        return list(zip([0, *ends], ends, strict=False))

    @functools.cached_property
    def _sources(self) -> list[set[tuple[Kind, int]]]:
        """For each scaling, then each export, the sites, given moments and maps it depends on, those detached aside."""
        made: dict[Place, set[tuple[Kind, int]]] = {}
        joins = dict(self.joins)
        for step in self.steps:
            if step.kind is Kind.READ:
                continue
            before = [] if step.kind is Kind.DETACHED else [p for p in (step.a, step.b) if p is not None]
            before = [q for p in before for q in (p,) * (p in made) + joins.get(p, ()) * (p not in made)]
            made[step.out] = set().union(*(made[p] for p in before))
            if step.kind in _READERS:
                made[step.out].add((step.kind, step.source))
        for place, parts in self.joins:
            made[place] = set().union(*(made[p] for p in parts))
        found = [set[tuple[Kind, int]]() if s.place is None else made[s.place] for s in self.scalings]
        found = [sources | {(Kind.SITE, s.site)} for s, sources in zip(self.scalings, found, strict=True)]
        return [*found, *(made[place] for place, _ in self.exports)]

    def asked(self, grads: Sequence[Tensor | None]) -> list[bool]:
        """Which tensors beside weights, in the order of `Parts`, gradients arrive at."""
        count = 3 * len(self.scalings)
        arrive = [any(g is not None for g in grads[i : i + 3]) for i in range(0, count, 3)]
        arrive += [any(g is not None for g in grads[i : i + 2]) for i in range(count, len(grads), 2)]
        counts = {Kind.SITE: len(self.channels), Kind.GIVEN: len(self.given), Kind.MAPPED: len(self.maps)}
        if all(arrive):
            return [True] * (2 * sum(counts.values()))
        known = set().union(*(source for source, here in zip(self._sources, arrive, strict=True) if here))
        sites, given, maps = ([(kind, i) in known for i in range(n)] for kind, n in counts.items())
        return [*sites, *sites, *given, *given, *(here for here in maps for _ in range(2))]

    @functools.cached_property
    def layouts(self) -> dict[Any, NativeLayout]:
        """As compiled functions read it, for all that this depends on; those that were made."""
        return {}

    @functools.cached_property
    def readings(self) -> WeakKeyDictionary[Any, Any]:
        """What the last runs found in each network that has it, by the first of its sites."""
        return WeakKeyDictionary()

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

    def _moved(self, step: Step, read: Any, found: Found, parts: Parts) -> Moments:
        """What one step gives, in torch's operations."""
        match step.kind:
            case Kind.STANDARD:
                like = parts.like
                return Moments(like.new_zeros(1), like.new_ones(1))
            case Kind.GIVEN:
                return Moments(parts.means[step.source].reshape(-1), parts.variances[step.source].reshape(-1))
            case Kind.SITE:
                return Moments(parts.betas[step.source], parts.gammas[step.source].square())
            case Kind.RECTIFIED:
                slope = step.number if step.module is None else found.settings[step.module]
                assert type(slope) is float
                return Moments(*rectified_moments(read(step.a).mean, read(step.a).var, slope))
            case Kind.CURVED:
                setting = step.curve if step.module is None else found.settings[step.module]
                assert type(setting) is tuple
                return Moments(*lane_moments(setting[0], read(step.a).mean, read(step.a).var, dict(setting[1])))
            case Kind.MAPPED:
                weight, bias = parts.maps[2 * step.source : 2 * step.source + 2]
                return _mapped(read(step.a), weight, bias, self.maps[step.source].groups)
            case Kind.SUM:
                result: Moments = read(step.a).plus(read(step.b).scaled(step.number))
            case Kind.PRODUCT:
                result = read(step.a).times(read(step.b))
            case Kind.SCALED:
                result = Moments(read(step.a).mean * step.number, read(step.a).var * step.other)
            case Kind.LARGEST:
                result = Moments(read(step.a).mean + read(step.a).std * step.number, read(step.a).var * step.other)
            case Kind.WIDENED:
                result = widened(read(step.a), step.other)
            case Kind.DETACHED:
                result = Moments(read(step.a).mean.detach(), read(step.a).var.detach())
            case _:
                result = read(step.a)
        return result


def _mapped(x: Moments, weight: Tensor | None, bias: Tensor | None, groups: int) -> Moments:
    """Moments behind a linear layer."""
    assert weight is not None
    count = weight.shape[1] * groups
    mean, var = weight_moments(weight, x.mean.expand(count), x.var.expand(count), groups=groups)
    return Moments(mean if bias is None else mean + bias, var)
