"""Which operations of a moment lane one compiled call can do together."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from normprop.conversion.held_operations import is_held
from normprop.conversion.segment_writer import SegmentGroup, SegmentWriter
from normprop.graph.node import Node, map_nodes, placed
from normprop.graph.node import run as run_target
from normprop.precision import reference_tensor
from normprop.sites.site import site_moments, site_scales


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
    held = {node for node in nodes if is_held(node, values)}
    level = _levels(nodes, held)
    readers: dict[Node, set[Node]] = {}
    for node in nodes:
        for source in node.inputs:
            readers.setdefault(source, set()).add(node)
    wanted = set(outputs)

    def laid(some: Sequence[Node]) -> SegmentGroup:
        inside = set(some)
        return SegmentWriter(some, values, {n for n in some if n in wanted or readers.get(n, set()) - inside}).group()

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
    return [group for group in groups if group.has_tensors()], level  # constants alone are left to torch


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
