"""Operations of a moment lane that one call does together."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from normprop.conversion.program_calls import composed_activations, module_activations, named_activations, settings_of
from normprop.graph.node import Node
from normprop.rules.composed import composed
from normprop.rules.elementwise import module_activation, named_activation
from normprop.sites.site import site_moments, site_scales

# Sites are computed together until their weights hold this many numbers. From there on a site costs more than its calls,
# and the gradients of large weights had better not wait for each other.
_TOGETHER = 1 << 18


class NodeGroup:
    """Nodes that one call replaces.

    Args:
        nodes: calls of one function.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes

    def reads(self) -> list[Node]:
        """The nodes that the one call reads."""
        return [a for node in self.nodes for a in node.inputs]

    def call(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The one call: it returns an entry per node."""
        first = self.nodes[0]
        args = [node.args for node in self.nodes]
        if first.target in (site_scales, site_moments):
            return first.target, tuple(a[0] for a in args), {}
        if first.target is module_activation:
            return module_activations, (tuple(a[0] for a in args), *(a[1] for a in args)), {}
        if first.target is composed:
            return composed_activations, (tuple(a[0] for a in args), *args[0][1:]), {}
        name, parameters, _, *rest = args[0]
        return named_activations, (name, parameters, tuple(a[2] for a in args), *rest), first.kwargs


def site_groups(nodes: Sequence[Node], root: nn.Module) -> Iterator[NodeGroup]:
    """Consecutive sites."""
    together: list[Node] = []
    size = 0
    for node in nodes:
        if node.target is not site_scales:
            continue
        weight = node.args[0][0]
        together.append(node)
        size += 0 if weight is None else operator.attrgetter(weight.target)(root).numel()
        if size >= _TOGETHER:
            yield NodeGroup(together)
            together, size = [], 0
    if together:
        yield NodeGroup(together)


def moment_groups(nodes: Sequence[Node]) -> Iterator[NodeGroup]:
    """What leaves sites: parameters alone decide it, so all of it can be known at once."""
    together = [node for node in nodes if node.target is site_moments]
    if together:
        yield NodeGroup(together)


def activation_groups(
    nodes: Sequence[Node], root: nn.Module, held: Collection[Node], level: Mapping[Node, int]
) -> Iterator[NodeGroup]:
    """Equal activations behind equally many others and segments, so that none waits for another; not those that are held."""
    depth: dict[Node, int] = {}
    groups: dict[Hashable, list[Node]] = {}
    for node in nodes:
        key = None if node in held else _activation_key(node, root)
        depth[node] = max((depth[a] for a in node.inputs), default=0) + (key is not None)
        if key is not None:
            groups.setdefault((level.get(node, 0), depth[node], key), []).append(node)
    yield from (NodeGroup(together) for together in groups.values() if len(together) > 1)


def _activation_key(node: Node, root: nn.Module) -> Hashable:
    """Equal for calls of the same function with the same parameters; None for anything else."""
    if node.target is module_activation:
        module = root.get_submodule(node.args[0].target)
        if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
            return None
        return type(module), repr(sorted(settings_of(module).items()))
    if node.target is named_activation and len(node.inputs) == 1:
        return "", repr((*node.args[:2], *node.args[3:], sorted(node.kwargs.items())))
    if node.target is composed and len(node.inputs) == 1:
        return "composed", repr(node.args[1:])
    return None
