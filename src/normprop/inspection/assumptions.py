"""Where the assumptions of an exact rule fail by a network's own construction."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normprop.channel_moments import Moments
from normprop.graph.node import Node, nodes_in
from normprop.graph.rule_search import site_rule
from normprop.graph.walk import Walk
from normprop.inspection.rewalk import Claim
from normprop.rules import (
    arithmetic,
    attention,
    combine,
    elementwise,
    linear,
    normalization,
    pooling,
    reduction,
    select,
    shape,
)
from normprop.rules.composed import composed
from normprop.rules.uniform import Uniform

_JOINS = frozenset(
    [
        arithmetic.add,
        arithmetic.sub,
        arithmetic.rsub,
        arithmetic.mul,
        arithmetic.div,
        arithmetic.maximum,
        arithmetic.minimum,
        arithmetic.addcmul,
        arithmetic.lerp,
        reduction.max_,
        reduction.min_,
    ]
)
_SCALAR = frozenset([arithmetic.power, elementwise.named_activation, elementwise.module_activation, composed])
_MAXIMA = frozenset([arithmetic.maximum, arithmetic.minimum, reduction.max_, reduction.min_])
_MOVES = frozenset(
    [
        shape.move,
        shape.roll,
        shape.flip,
        shape.reshape,
        shape.reshape_module,
        shape.squeeze,
        shape.channel_shuffle,
        shape.channel_shuffle_module,
        shape.attribute,
        shape.same,
        shape.same_module,
        arithmetic.neg,
    ]
)
_PICKS = frozenset([select.getitem, select.index_select])
_PARTS = _PICKS | {select.narrow, select.select, combine.split, combine.chunk, combine.unbind}
_REPEATS = frozenset(
    [
        shape.repeat,
        shape.expand,
        shape.interpolate,
        shape.nearest,
        select.unfold,
        select.patches,
        select.patches_module,
        combine.repeating_pad_module,
        combine.pad,
    ]
)
_TOGETHER = frozenset([combine.cat, combine.stack])
_SUMS = frozenset(
    [
        linear.convolution,
        linear.functional_convolution,
        linear.transposed_convolution,
        linear.functional_transposed_convolution,
        linear.linear,
        linear.functional_linear,
        linear.bilinear,
        attention.matmul,
        attention.addmm,
        attention.einsum,
    ]
)
_NORMALISERS = frozenset([normalization.batch_norm, normalization.functional_batch_norm, site_rule])

_UNEVEN = frozenset(
    [
        combine.pad,
        combine.constant_pad_module,
        shape.pixel_shuffle,
        shape.pixel_shuffle_module,
        linear.transposed_convolution,
        linear.functional_transposed_convolution,
        pooling.max_unpool,
    ]
)
_PADS = frozenset([combine.pad, combine.constant_pad_module])
_REGROUPS = frozenset(
    [shape.pixel_unshuffle, shape.pixel_unshuffle_module, select.unfold, select.patches, select.patches_module]
)

_WEIGHTED = frozenset([linear.convolution, linear.functional_convolution, linear.linear, linear.functional_linear])
# A sum over no more numbers than a window of 3 × 3 may be as far from Gaussian as they are.
_FEW = 9

DEPENDENT = "both sides are functions of one tensor, and are taken for independent"
REPEATED = "its input holds the same numbers several times, and they are taken for independent"
MIXED = "its input is not Gaussian: a mixture, or the function of something that is"
UNEVEN = "positions differ in what they hold, and a part of them is taken for all"

Root = tuple[Node, tuple[Node, ...]]


class Assumptions:
    """Follows what of a walk's tensors is Gaussian, and what repeats, from node to node.

    Inputs, sums over more than a few numbers and what a BatchNorm gives count as Gaussian.

    Args:
        walk: of a network.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.mixed: set[Node] = set()
        self.repeated: set[Node] = set()
        self.uneven: set[Node] = set()
        self.roots: dict[Node, frozenset[Root]] = {}

    def broken(self, node: Node, moments: Mapping[Node, Any]) -> str:
        """What an exact rule assumes of a node's arguments and doesn't hold; "" if all does. Nodes come in their order.

        Args:
            node: an operation on data with a rule, or an input.
            moments: of the nodes before.
        """
        if node.op == "input":
            self.roots[node] = frozenset([(node, ())])
            return ""
        rule = self.walk.rules[node].function
        sources = self.walk.data_arguments(node)
        self.roots[node] = self._roots_of(node, rule, sources)
        mixed = any(source in self.mixed for source in sources)
        repeated = any(source in self.repeated for source in sources)
        joined = rule in _JOINS and len(sources) > 1
        itself = len(sources) == 2 and sources[0] is sources[-1]  # which the rules of sums and products know
        pairs = [(a, b) for i, a in enumerate(sources) for b in sources[:i]]
        dependent = joined and not itself and any(self._overlap(a, b) for a, b in pairs)
        if rule in _TOGETHER:
            repeated = repeated or any(self._overlap(a, b) for a, b in pairs)
        self._note(node, rule, sources, mixed, repeated)
        if dependent:
            return DEPENDENT
        if rule in _PARTS and sources[0] in self.uneven and _cuts(node, moments.get(sources[0])):
            return UNEVEN
        if rule in _REGROUPS and sources[0] in self.uneven:
            return UNEVEN
        if rule in _SUMS and repeated:
            return REPEATED
        squared = rule is arithmetic.mul and joined and itself
        needs_gaussian = rule in _SCALAR or squared or (rule in _MAXIMA and joined)
        uniform = all(isinstance(moments.get(source), Uniform) for source in sources)
        return MIXED if needs_gaussian and mixed and not uniform else ""

    def _note(self, node: Node, rule: Any, sources: list[Node], mixed: bool, repeated: bool) -> None:
        """What the node itself is, for those after it."""
        widths = self._widths(node, rule)
        channels_alone = rule in _PADS and not any(widths[: 2 * (node.value.dim() - 2)])
        kept = channels_alone or (rule is combine.pad and self._repeats_values(node))
        if (rule in _UNEVEN and not kept) or any(source in self.uneven for source in sources):
            self.uneven.add(node)
        if rule in _SUMS or isinstance(rule, Claim):
            several_phases = rule in (linear.transposed_convolution, linear.functional_transposed_convolution)
            if several_phases or (mixed and rule in _WEIGHTED and self._terms(node) <= _FEW):
                self.mixed.add(node)
            return
        if repeated or (rule in _REPEATS and not channels_alone) or (rule in _PICKS and self._picks_twice(node)):
            self.repeated.add(node)
        if rule in _NORMALISERS:
            return
        pure = self._passes(node) or (rule in _MOVES | _PARTS | _REPEATS | _TOGETHER and rule not in _PADS) or kept
        affine = rule in _JOINS - _MAXIMA and not (len(sources) > 1 and rule in (arithmetic.mul, arithmetic.div))
        squared = rule is arithmetic.mul and len(sources) > 1
        if mixed or squared or not (pure or affine):
            self.mixed.add(node)

    def _picks_twice(self, node: Node) -> bool:
        """Whether an index names an entry several times."""
        chosen = [self.walk.known(n) for n in nodes_in((node.args[1:], node.kwargs)) if not n.data]
        return any(len(c.unique()) < c.numel() for c in chosen if isinstance(c, Tensor) and c.dtype != torch.bool)

    def _terms(self, node: Node) -> int:
        """Over how many numbers a layer sums."""
        if node.op == "module":
            weight: Any = self.walk.module(node).weight
        else:
            known = [n.value for n in nodes_in((node.args[1:], node.kwargs)) if not n.data]
            if not known:
                return _FEW + 1
            weight = known[0]
        return int(weight[0].numel())

    def _passes(self, node: Node) -> bool:
        """Whether a node is noise of training, and switched off."""
        return self.walk.rules[node].training_only and not self.walk.model.training

    def _widths(self, node: Node, rule: Any) -> tuple[int, ...]:
        """How far a node pads, last dimension first."""
        if rule is combine.pad:
            return tuple(node.kwargs.get("pad") or node.args[1])
        widths: Any = self.walk.module(node).padding if rule in _PADS else ()
        return tuple(widths)

    @staticmethod
    def _repeats_values(node: Node) -> bool:
        """Whether padding takes values from the tensor itself."""
        return (node.kwargs.get("mode") or (node.args[2] if len(node.args) > 2 else "constant")) != "constant"

    def _roots_of(self, node: Node, rule: Any, sources: list[Node]) -> frozenset[Root]:
        """The tensors of which a node's elements are functions, each with the parts that were taken of it."""
        if isinstance(rule, Claim) or not sources:
            return frozenset([(node, ())])
        if rule in _PARTS:
            whole = self.roots[sources[0]] if len(sources) == 1 else frozenset([(node, ())])
            # A list of pieces is no part yet: its entries are.
            return whole if not hasattr(node.value, "shape") else frozenset((n, (*path, node)) for n, path in whole)
        if rule in _SUMS:  # with weights, whose sums are numbers of their own
            return frozenset([(node, ())])
        return frozenset(root for source in sources for root in self.roots[source])

    def _overlap(self, a: Node, b: Node) -> bool:
        """Whether two nodes hold functions of the same numbers."""
        return any(n is m and _meet(p, q) for n, p in self.roots[a] for m, q in self.roots[b])


def _meet(first: tuple[Node, ...], second: tuple[Node, ...]) -> bool:
    """Whether two parts of one tensor may have elements in common."""
    for a, b in zip(first, second, strict=False):
        if a is not b:
            return not _apart(a, b)
    return True


def _apart(a: Node, b: Node) -> bool:
    """Whether two entries of one list of pieces, or slices of one tensor, have no element in common."""
    if a.target is not operator.getitem or b.target is not operator.getitem or a.args[0] is not b.args[0]:
        return False
    (first, second), tensor = (a.args[1], b.args[1]), a.args[0].value
    if not hasattr(tensor, "shape"):
        return bool(first != second)
    return any(
        _ranges_apart(i, j, size)
        for i, j, size in zip(_entries(first), _entries(second), tensor.shape, strict=False)
        if Ellipsis not in (*_entries(first), *_entries(second))
    )


def _cuts(node: Node, x: Any) -> bool:
    """Whether a part is taken along a dimension over which the moments of a tensor are those of all."""
    tensor = node.inputs[0].value
    if not isinstance(x, Moments) or not hasattr(tensor, "shape"):
        return False
    pooled = [d for d, (size, whole) in enumerate(zip(x.mean.shape, tensor.shape, strict=True)) if size == 1 < whole]
    if node.target is operator.getitem:
        entries = _entries(node.args[1])
        if Ellipsis in entries or None in entries:
            return any(entry not in (Ellipsis, None, slice(None)) for entry in entries) and bool(pooled)
        return any(entry != slice(None) and d in pooled for d, entry in enumerate(entries))
    name = str(getattr(node.target, "__name__", node.target))
    place = 2 if name in ("split", "chunk") else 1
    dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else 0)
    return not isinstance(dim, int) or dim % tensor.dim() in pooled


def _entries(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _ranges_apart(i: Any, j: Any, size: int) -> bool:
    places = [range(size)[e] if isinstance(e, slice) else [e % size] if isinstance(e, int) else None for e in (i, j)]
    return None not in places and not set(places[0] or ()) & set(places[1] or ())


def standing_of(walk: Walk, node: Node, reason: str) -> tuple[str, str]:
    """Standing and reason of a node's rule, for a report.

    Args:
        walk: of the network.
        node: one of its nodes with a rule.
        reason: what `Assumptions.broken` said.
    """
    if node.target is operator.getitem and node.args[0] in walk.rules and not hasattr(node.args[0].value, "shape"):
        node = node.args[0]  # an entry of several results is what these are
    standing, why = walk.standing(node)
    return ("approximate", reason) if reason and standing == "exact" else (standing, why)
