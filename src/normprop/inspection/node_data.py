"""A report as node data of Model Explorer: numbers by the names that an exported network's operations have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import fx

from normprop.errors import NormPropError
from normprop.inspection.row import Row

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Value = Literal["std", "mean", "drift"]
_GRADIENT = ({"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#e8775a"})
_GRAPH = "graph"  # Model Explorer's name for the graph of an exported network


def node_data(rows: Sequence[Row], program: ExportedProgram, value: Value) -> dict[str, Any]:
    """Node data: graph → results → name of a node → value, with a gradient from white to red.

    A row of a module is found by the module's path and the count of its calls: the last node that the exported network runs
    for it. Operations of a module's own forward are found where it has as many of them as the report.

    Args:
        rows: of a report.
        program: the network, exported.
        value: "std", "mean" or "drift".

    Raises:
        NormPropError: another value, or no row is found again.
    """
    if value not in get_args(Value):
        raise NormPropError(f"value is {value!r}.\nUse one of {', '.join(get_args(Value))}.")
    calls = _calls(program.graph)
    results: dict[str, float] = {}
    for path in dict.fromkeys(row.path for row in rows):
        here = [row for row in rows if row.path == path and row.role != "input"]
        nodes = calls.get(path, [])
        if len(here) == len(nodes):
            results |= {
                node: number for row, node in zip(here, nodes, strict=True) if (number := _number(row, value)) is not None
            }
    if not results:
        raise NormPropError("no operation of the report is in the exported network.\nExport the network that was inspected.")
    return {_GRAPH: {"results": {name: {"value": v} for name, v in results.items()}, "gradient": list(_GRADIENT)}}


def _calls(graph: fx.Graph) -> dict[str, list[str]]:
    """The last node of each call of a leaf module, and the nodes of other modules' own forwards, by path."""
    found: dict[str, list[str]] = {}
    inner = {path for node in graph.nodes for path in _stack(node)[:-1]}
    before = None
    for node in graph.nodes:
        stack = _stack(node)
        if node.op != "call_function" or not stack:
            before = None
            continue
        path, _, _ = stack[-1].partition("@")
        names = found.setdefault(path, [])
        if stack[-1] in inner or stack[-1] != before:
            names.append(node.name)
        else:
            names[-1] = node.name
        before = stack[-1]
    return found


def _stack(node: fx.Node) -> list[str]:
    """Paths of the modules in whose forward a node runs, with ``@n`` for further calls."""
    return [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _number(row: Row, value: Value) -> float | None:
    if value == "drift":
        return row.drift
    summary = row.to_dict()["measured"] or row.to_dict()["predicted"]
    return float(summary[value])
