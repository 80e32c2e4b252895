"""A moment lane in few operations: what does not depend on each other is computed together."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from normprop.channel_moments import Moments
from normprop.conversion.lane import lane_nodes
from normprop.rules.composed import Program, composed
from normprop.rules.elementwise import module_activation, module_slope, named_activation, named_slope, natively_rectified
from normprop.sites.site import site_moments, site_scales

# Sites are computed together until their weights hold this many numbers. From there on a site costs more than its calls,
# and the gradients of large weights had better not wait for each other.
_TOGETHER = 1 << 18


def batched(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """The same graph, every lane operation as late as its first use, and equal ones done in one call.

    Args:
        graph: a graph that a `Rewriter` wrote, one call a site and an activation.
        root: the modules that it names.
    """
    groups = [*_site_groups(graph, root), *_moment_groups(graph), *_activation_groups(graph, root)]
    new = _Scheduled(graph, groups).run()
    new.lint()
    return new


def module_activations(module: nn.Module, *xs: Moments) -> list[Moments]:
    """`module_activation` of several tensors."""
    slope = module_slope(module)
    natively = None if slope is None else natively_rectified(xs, slope)
    return natively or _apart(module_activation(module, _together(xs)), xs)


def named_activations(
    name: str, parameters: tuple[str, ...], xs: Sequence[Moments], *args: Any, **kwargs: Any
) -> list[Moments]:
    """`named_activation` of several tensors."""
    slope = named_slope(name, parameters, xs[0], *args, **kwargs)
    natively = None if slope is None else natively_rectified(xs, slope)
    return natively or _apart(named_activation(name, parameters, _together(xs), *args, **kwargs), xs)


def composed_activations(
    xs: Sequence[Moments], program: Program, bends: tuple[float, ...], jumps: tuple[float, ...]
) -> list[Moments]:
    """`composed` of several tensors, without operands."""
    return _apart(composed(_together(xs), program, bends, jumps), xs)


def _together(xs: Sequence[Moments]) -> Moments:
    dim = _common(xs)
    if dim is None:
        xs = [x.expanded(torch.broadcast_shapes(x.mean.shape, x.var.shape)) for x in xs]
        return Moments(torch.cat([x.mean.reshape(-1) for x in xs]), torch.cat([x.var.reshape(-1) for x in xs]))
    return Moments(torch.cat([x.mean for x in xs], dim), torch.cat([x.var for x in xs], dim))


def _apart(whole: Moments, xs: Sequence[Moments]) -> list[Moments]:
    dim = _common(xs)
    if dim is not None:
        sizes = [x.mean.shape[dim] for x in xs]
        return [Moments(*pair) for pair in zip(whole.mean.split(sizes, dim), whole.var.split(sizes, dim), strict=True)]
    shapes = [torch.broadcast_shapes(x.mean.shape, x.var.shape) for x in xs]
    sizes = [shape.numel() for shape in shapes]
    parts = zip(whole.mean.split(sizes), whole.var.split(sizes), shapes, strict=True)
    return [Moments(mean.reshape(shape), var.reshape(shape)) for mean, var, shape in parts]


def _common(xs: Sequence[Moments]) -> int | None:
    """The one dimension along which all of them vary, if there is such a dimension: they are joined and split along it."""
    rank = xs[0].mean.dim()
    varying = {d for x in xs for t in (x.mean, x.var) for d, size in enumerate(t.shape) if size > 1}
    alike = all(x.mean.shape == x.var.shape and x.mean.dim() == rank for x in xs)
    return varying.pop() if alike and len(varying) == 1 else None


class _Group:
    """Nodes that one call replaces.

    Args:
        nodes: calls of one function.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes = nodes

    def reads(self) -> list[fx.Node]:
        """The nodes that the one call reads."""
        if self.nodes[0].target is not module_activation:
            return [a for node in self.nodes for a in node.all_input_nodes]
        module, first = self.nodes[0].all_input_nodes
        return [module, first, *(node.all_input_nodes[1] for node in self.nodes[1:])]

    def write(self, graph: fx.Graph, new: dict[fx.Node, fx.Node]) -> None:
        """One call, and for each node its entry of the result."""
        first = self.nodes[0]
        args: list[Any] = [fx.node.map_arg(node.args, new.get) for node in self.nodes]
        if first.target in (site_scales, site_moments):
            call = graph.call_function(first.target, tuple(a[0] for a in args))
            for i, node in enumerate(self.nodes):
                for item in node.users:
                    new[item] = graph.call_function(operator.getitem, (call, i))
            return
        if first.target is module_activation:
            call = graph.call_function(module_activations, (args[0][0], *(a[1] for a in args)))
        elif first.target is composed:
            call = graph.call_function(composed_activations, (tuple(a[0] for a in args), *args[0][1:]))
        else:
            name, parameters, _, *rest = args[0]
            call = graph.call_function(
                named_activations, (name, parameters, tuple(a[2] for a in args), *rest), dict(first.kwargs)
            )
        for i, node in enumerate(self.nodes):
            new[node] = graph.call_function(operator.getitem, (call, i))


def _site_groups(graph: fx.Graph, root: nn.Module) -> Iterator[_Group]:
    """Consecutive sites."""
    lane = lane_nodes(graph)
    nodes: list[fx.Node] = []
    size = 0
    for node in graph.nodes:
        if node.target is not site_scales or node not in lane:
            continue
        weight: Any = node.args[0][0]
        nodes.append(node)
        size += 0 if weight is None else operator.attrgetter(str(weight.target))(root).numel()
        if size >= _TOGETHER:
            yield _Group(nodes)
            nodes, size = [], 0
    if nodes:
        yield _Group(nodes)


def _moment_groups(graph: fx.Graph) -> Iterator[_Group]:
    """What leaves sites: parameters alone decide it, so all of it can be known at once."""
    nodes = [node for node in graph.nodes if node.target is site_moments]
    if nodes:
        yield _Group(nodes)


def _activation_groups(graph: fx.Graph, root: nn.Module) -> Iterator[_Group]:
    """Equal activations behind equally many others, so that none waits for another."""
    lane = lane_nodes(graph)
    depth: dict[fx.Node, int] = {}
    groups: dict[Hashable, list[fx.Node]] = {}
    for node in graph.nodes:
        if node not in lane:
            continue
        key = _activation_key(node, root)
        depth[node] = max((depth[a] for a in node.all_input_nodes), default=0) + (key is not None)
        if key is not None:
            groups.setdefault((depth[node], key), []).append(node)
    yield from (_Group(nodes) for nodes in groups.values() if len(nodes) > 1)


def _activation_key(node: fx.Node, root: nn.Module) -> Hashable:
    """Equal for calls of the same function with the same parameters; None for anything else."""
    if node.target is module_activation:
        module = root.get_submodule(str(node.args[0].target))  # type: ignore[union-attr]  # the module's node
        if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
            return None
        settings = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in ("training", "inplace")}
        return type(module), repr(sorted(settings.items()))
    if node.target is named_activation and len(node.all_input_nodes) == 1:
        return "", repr((*node.args[:2], *node.args[3:], sorted(node.kwargs.items())))
    if node.target is composed and len(node.all_input_nodes) == 1:
        return "composed", repr(node.args[1:])
    return None


class _Scheduled:
    """Copies a graph in the order in which values are needed.

    Args:
        graph: the graph.
        groups: what to compute together.
    """

    def __init__(self, graph: fx.Graph, groups: Sequence[_Group]) -> None:
        self.source = graph
        self.lane = lane_nodes(graph)
        self.group = {node: group for group in groups for node in group.nodes}
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.attributes: dict[str, fx.Node] = {}
        self.written: set[_Group] = set()

    def run(self) -> fx.Graph:
        """The new graph."""
        for node in self.source.nodes:
            if node not in self.lane:
                self._write(node)
        return self.graph

    def _write(self, node: fx.Node) -> None:
        """Write a node behind everything it reads; not by recursion, for lanes may be deep."""
        stack = [node]
        while stack:
            current = stack[-1]
            group = self.group.get(current)
            if current in self.new or group in self.written:
                stack.pop()
                continue
            reads = group.reads() if group else current.all_input_nodes
            missing = [a for a in reads if a not in self.new and self.group.get(a) not in self.written]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            if current.op == "get_attr":
                self.new[current] = self._attribute(str(current.target))
            elif group is None:
                self.new[current] = self.graph.node_copy(current, self.new.__getitem__)
            else:
                group.write(self.graph, self.new)
                self.written.add(group)

    def _attribute(self, path: str) -> fx.Node:
        """The node of a parameter or module, one for all its uses."""
        if path not in self.attributes:
            self.attributes[path] = self.graph.get_attr(path)
        return self.attributes[path]
