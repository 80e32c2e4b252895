"""What kind of operation a row is, told from the rule that predicts it."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import getdoc
from typing import Any

from normprop.graph.node import Node
from normprop.graph.rule_search import site_rule
from normprop.graph.walk import Walk
from normprop.inspection.rewalk import Claim
from normprop.inspection.row import Role
from normprop.rules import normalization

_CONSTANT = frozenset([normalization.frozen_batch_norm, normalization.local_response_norm,
                       normalization.functional_local_response_norm])  # fmt: skip
_FAMILIES: Mapping[str, Role] = {
    "linear": "linear",
    "normalization": "normaliser",
    "pooling": "average",
    "reduction": "average",
    "attention": "average",
    "arithmetic": "join",
    "elementwise": "activation",
    "composed": "activation",
}


def role_of(walk: Walk, node: Node) -> Role:
    """The role of an operation on data; arithmetic with one tensor is "other", max-pooling no average."""
    function = rule_function(walk, node)
    if function is None:
        return "input"
    if function is site_rule or isinstance(function, Claim):
        return "normaliser"
    module = getattr(function, "__module__", "")
    role = _FAMILIES.get(module.rpartition(".")[2], "other") if module.startswith("normprop.rules.") else "other"
    if function in _CONSTANT or (role == "average" and "max" in function.__name__):
        return "other"
    several = len({id(source) for source in walk.data_arguments(node)}) > 1
    return "other" if role == "join" and not several else role


def rule_function(walk: Walk, node: Node) -> Any:
    """The rule that predicts a node's moments; None for an input."""
    return None if node.op == "input" else walk.call(node, lambda n: n, lambda n: n)[0]


def rule_text(function: Any) -> str:
    """Name of a rule, and what it says of itself: its equation and source."""
    if function is None:
        return ""
    named = function if hasattr(function, "__name__") else type(function)
    text = (getdoc(function) or "").split("\n\nArgs:")[0].split("\n\nAttributes:")[0]
    return f"{named.__module__}.{named.__name__}\n{text}".strip()


def sources_of(walk: Walk, node: Node, rows: Mapping[Node, str]) -> tuple[str, ...]:
    """Names of the rows whose tensors a node reads, through operations that return several."""
    found: dict[str, None] = {}
    stack, seen = list(reversed(walk.data_arguments(node))) if node.op != "input" else [], set()
    while stack:
        source = stack.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in rows:
            found[rows[source]] = None
        elif source.op != "input":
            stack.extend(reversed(walk.data_arguments(source)))
    return tuple(found)
