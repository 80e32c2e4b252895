"""The moment lane of a converted graph: what depends on parameters alone."""

from __future__ import annotations

from torch import fx


def lane_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that do not depend on any input: parameters, the moment lane, effective weights."""
    lane: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and all(a in lane for a in node.all_input_nodes):
            lane.add(node)
    return lane


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """node → values that nothing after it reads."""
    seen: set[fx.Node] = set()
    frees: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                frees.setdefault(node, []).append(used)
    return frees
