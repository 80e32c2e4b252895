"""Segments of a lane as compiled functions read them."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

from normprop.activations.compiled_curves import native_curve
from normprop.conversion.activation_setting import Setting
from normprop.conversion.segment import Kind, Segment
from normprop.native.library import NODES, NativeLayout
from normprop.native.structures import Curve, MomentOperation, SiteScaling
from normprop.sites.c_engine import geometry
from normprop.sites.rows import Form


class LayoutKey(NamedTuple):
    """What a layout depends on beside the segment.

    Attributes:
        threads: that share the work.
        forms: of the layers.
        ranks: directions of each scaling, over all groups.
        outside: whether the taps of each weight's filters lie outside their inputs in memory.
        settings: of the modules.
        exact: whether numbers have double precision.
    """

    threads: int
    forms: tuple[Form, ...]
    ranks: tuple[int, ...]
    outside: tuple[bool, ...]
    settings: tuple[Setting, ...]
    exact: bool


def laid_out(segment: Segment, key: LayoutKey) -> NativeLayout:
    """A segment as C reads it. Tensors are numbered as `Parts` has them, then d, k and U of each scaling."""
    weights, sites, given = segment.weights, len(segment.channels), len(segment.given)
    maps = weights + 2 * (sites + given)
    operations = (MomentOperation * len(segment.steps))()
    curves: list[Curve] = []
    numbers = 0
    for o, step in zip(operations, segment.steps, strict=True):
        o.kind, o.size, o.number, o.other = step.kind, step.out.size, step.number, step.other
        o.mean, o.var = step.out.mean, step.out.var
        if step.a is not None:
            o.a_mean, o.a_var, o.a_size = step.a
        if step.b is not None:
            o.b_mean, o.b_var, o.b_size = step.b
        setting = step.curve if step.module is None else key.settings[step.module]
        if step.kind is Kind.RECTIFIED and type(setting) is float:
            o.number = setting
        elif step.kind is Kind.CURVED:
            assert type(setting) is tuple
            assert step.b is not None
            curve = native_curve(*setting, key.exact)
            assert curve is not None
            curves.append(curve)
            o.curve, o.slopes = ctypes.addressof(curve), step.b.mean
            numbers += step.out.size * NODES
        elif step.kind is Kind.MAPPED:
            m = segment.maps[step.source]
            o.first, o.second = maps + 2 * step.source, maps + 2 * step.source + 1 if m.offset else -1
            o.groups, o.number, o.taps = m.groups, m.shape[1], math.prod(m.shape[2:])
            numbers += math.prod(m.shape)
        elif step.kind is Kind.GIVEN:
            o.a_size, o.b_size = segment.given[step.source]
            o.first, o.second = weights + 2 * sites + step.source, weights + 2 * sites + given + step.source
        elif step.kind is Kind.SITE:
            o.first, o.second = weights + step.source, weights + sites + step.source
        elif step.kind is Kind.READ:
            at = 3 * len(segment.scalings) + 2 * step.source
            o.first, o.second = at, at + 1
    scalings = (SiteScaling * len(segment.scalings))()
    column = 0
    first = maps + 2 * len(segment.maps)
    for i, (c, s) in enumerate(zip(scalings, segment.scalings, strict=True)):
        size = segment.channels[s.site]
        outside = s.weight is not None and key.outside[s.weight]
        laid = geometry(key.forms[i], size, s.shape, outside, key.threads, key.ranks[i])
        c.weight = -1 if s.weight is None else s.weight
        c.gamma, c.beta, c.shift, c.scale = weights + s.site, weights + sites + s.site, first + 3 * i, first + 3 * i + 1
        c.directions = first + 3 * i + 2 if key.ranks[i] else -1
        c.mean, c.var = (-1, -1) if s.place is None else s.place[:2]
        c.column = column
        c.groups, c.filters, c.inputs, c.taps, c.taps_first, c.stride, c.center, c.blocks, c.rank = laid.fields
        column += size
        numbers += laid.numbers
    return NativeLayout(operations, scalings, column, numbers, tuple(curves))
