"""The rule of every operation that a record holds, and what has none."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.graph.example_inputs import Inputs
from normprop.graph.fusion import Fused, Fusion
from normprop.graph.node import Node
from normprop.graph.record import Record
from normprop.graph.walk import Walk, standing_for
from normprop.rules import attention, pooling, reduction
from normprop.rules.elementwise import module_activation as activation
from normprop.rules.table import TABLE, Key, Rule, RuleTable
from normprop.sites.site import Site, site_moments

# Rules of operations whose second result has no moments.
_HALF_KNOWN = frozenset([reduction.max_, reduction.min_, pooling.max_pool, pooling.max_pool_with_indices,
                         attention.multihead_attention])  # fmt: skip


def walk_over(model: nn.Module, record: Record, example: Inputs, table: RuleTable) -> Walk:
    """The walk of a record: rules found, elementwise operations on one tensor taken together."""
    found: dict[Node, Rule] = {}
    missing: dict[Node, str] = {}
    for node in record.nodes:
        if not node.data or node.op == "input":
            continue
        rule = rule_of(record.model, node, table)
        if rule is not None and not _takes(rule, node):
            standing, reason = "unsupported", "its rule does not know all of its arguments"
        else:
            standing, reason = ("unsupported", _no_rule(node)) if rule is None else standing_for(node, rule)
        if rule is None or standing == "unsupported":
            missing[node] = reason
        else:
            found[node] = rule
    for node in _without_moments(found):
        for user in node.users:
            if user.data and not (user in found and found[user].function is pooling.max_unpool):
                found.pop(user, None)
                missing[user] = "it reads indices or attention weights, which have no moments here"
    bare = Walk(model, record, example, found)
    fused = {n: f for n, f in Fusion(record, bare.known, model, found).run().items() if f.source not in missing}
    found |= {node: function.rule() for node, function in fused.items()}
    inner = inner_nodes(record.nodes, fused)
    left = {node: reason for node, reason in missing.items() if node not in fused and node not in inner}
    return Walk(model, record, example, found, fused, left)


def _without_moments(found: Mapping[Node, Rule]) -> list[Node]:
    """The entries of results that no rule speaks of: the indices of maxima, the weights of attention."""
    return [
        node
        for node in found
        if node.target in (operator.getitem, getattr)
        and node.args[1:] in ((1,), ("indices",))
        and node.args[0] in found
        and found[node.args[0]].function in _HALF_KNOWN
    ]


def _takes(rule: Rule, node: Node) -> bool:
    """Whether a rule can be called with a node's arguments; `normprop.rules.activation` says of any function what it is."""
    if rule.function is activation and node.op != "module":
        return True
    given = (*rule.leading, *((None,) if node.op == "module" else ()), *node.args)
    named = dict(node.kwargs) | (dict.fromkeys(("in_shapes", "out_shape")) if rule.shaped else {})
    if not node.args and "input" in named:
        given = (*given, named.pop("input"))
    signature = _parameters_of(rule.function)
    try:
        if signature is not None:
            signature.bind(*given, **named)
    except TypeError:
        return False
    return True


@functools.cache
def _parameters_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """A function's signature; None for one of C that doesn't tell what it takes."""
    try:
        return inspect.signature(function)
    except ValueError:
        return None


def _no_rule(node: Node) -> str:
    return "its maker was not seen; give the module around it a rule" if node.op == "unseen" else "no moment rule"


def rule_of(model: nn.Module, node: Node, table: RuleTable) -> Rule | None:
    """The table's rule for what a node runs."""
    if node.op == "module":
        return table.for_module(model.get_submodule(node.target))
    return None if node.op == "unseen" else table.for_function(node.target)


def inner_nodes(nodes: Sequence[Node], fused: Mapping[Node, Fused]) -> set[Node]:
    """Nodes that appear within composed functions alone: nothing asks for their moments."""
    inner: set[Node] = set()
    sources = {function.source for function in fused.values()}
    for node in reversed(nodes):
        if (
            node.users
            and node not in sources
            and all(u in inner or (u in fused and fused[u].source is not node) for u in node.users)
        ):
            inner.add(node)
    return inner


def site_rule(module: Site, x: Moments) -> Moments:
    """``γ û + β`` with E û = 0 and Var û = 1: what a site is there for (Arpit et al., 2016, §3)."""
    (found,) = site_moments((module, x.mean.dim(), 1))
    return found


def expand_site(site: Site, call: Callable[..., Any], x: Tensor) -> Tensor:
    """A site, then the modules that it holds: the activation of a norm-act module."""
    x = call(site.normalize if site.lane is not None and not x.is_meta else lambda x: x.clone(), x)
    for module in site.children():
        x = module(x)
    return x


def table_with(rules: Mapping[Key, Rule | Callable[..., Any]] | None) -> RuleTable:
    """The table of rules with those of one call before it."""
    own: dict[Key, Rule | Callable[..., Any]] = {Site: Rule(site_rule)}
    own.update(rules or {})
    return TABLE.with_overrides(own)
