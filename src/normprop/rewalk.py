"""A walk of a network that is converted already: its own graph, with what its sites claim."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from normprop import paper, sites
from normprop.channel_moments import Moments
from normprop.converted import ConvertedModule
from normprop.example import EXAMPLE_BATCH
from normprop.lane import lane_nodes
from normprop.rules.table import TABLE, Key, Rule
from normprop.trace import Leaf
from normprop.walk import Kind, Walk, completed, prepare, rule_of, standing_for


def walk_of(
    model: nn.Module,
    *,
    rules: Mapping[Key, Rule | Callable[..., Any]] | None = None,
    leaf_modules: Sequence[Leaf] = (),
    shape: tuple[int, ...] | None = None,
) -> Walk:
    """The walk of any model, complete: traced anew, or of its own graph if `convert` made it.

    Args:
        model: the network.
        rules: overrides for this call.
        leaf_modules: modules to keep whole when tracing.
        shape: shape of one sample, if known.

    Raises:
        TracingError: control flow on values, or no fitting input shape.
        UnsupportedOpError: operations without a rule, all of them named.
    """
    if isinstance(model, ConvertedModule):
        walk = _rewalk(model, rules, shape)
    else:
        walk = prepare(model, rules=rules, leaf_modules=leaf_modules, shape=shape)
    walk.require()
    return walk


def _rewalk(
    model: ConvertedModule, rules: Mapping[Key, Rule | Callable[..., Any]] | None, shape: tuple[int, ...] | None
) -> Walk:
    graph_module = _copy(model)
    graph = graph_module.graph
    lane = lane_nodes(graph)
    values = _run(graph_module, model.example_inputs(EXAMPLE_BATCH), shape)
    kinds = {node: _kind(node, values.get(node), lane) for node in graph.nodes}
    table = TABLE.with_overrides(rules)
    found: dict[fx.Node, Rule] = {}
    missing: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if kinds[node] is not Kind.DATA or node.op in ("placeholder", "output"):
            continue
        rule = Rule(_affine) if node.target is sites.apply_affine else rule_of(graph_module, node, table)
        standing, reason = ("unsupported", "no moment rule") if rule is None else standing_for(node, rule, kinds)
        if rule is None or standing == "unsupported":
            missing[node] = reason
        else:
            found[node] = _claiming(node, rule, values) if _pair(node) is not None else rule
    return completed(graph_module, values, kinds, found, missing)


def _copy(model: ConvertedModule) -> fx.GraphModule:
    """The model with a graph of its own, to which a walk may add."""
    graph = fx.Graph()
    output = graph.graph_copy(model.graphs()[model.training], {})
    graph.output(output)
    return fx.GraphModule(model, graph)


@torch.no_grad()
def _run(model: fx.GraphModule, inputs: list[Tensor], shape: tuple[int, ...] | None) -> dict[fx.Node, Any]:
    """Every node's value in a run on zeros."""
    inputs = [torch.zeros_like(x) for x in inputs]
    if shape is not None:
        inputs[0] = inputs[0].new_zeros(EXAMPLE_BATCH, *shape)
    run = fx.Interpreter(model, garbage_collect_values=False)
    run.run(*inputs)
    return dict(run.env)


def _kind(node: fx.Node, value: Any, lane: set[fx.Node]) -> Kind:
    if node in lane:
        return Kind.TENSOR
    holds = isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value))
    return Kind.DATA if holds or node.op == "output" else Kind.STATIC


def _pair(node: fx.Node) -> Any:
    """The lane node that computed a site's weight and bias for this data node, if any did."""
    position = 1 if node.target is sites.apply_affine or node.op == "call_function" else None
    item: Any = node.args[position] if position is not None and len(node.args) > position else None
    if not isinstance(item, fx.Node) or item.target is not operator.getitem:
        return None
    pair: Any = item.args[0]
    known = (sites.effective_weight, sites.effective_affine, paper.unit_weight, paper.gain_and_bias)
    return pair if isinstance(pair, fx.Node) and pair.target in known else None


@torch.no_grad()
def _claiming(node: fx.Node, rule: Rule, values: Mapping[fx.Node, Any]) -> Rule:
    """The rule of a layer that a site answers for: N(β, γ²), whatever independence would predict."""
    pair = _pair(node)
    site_node = next(a for a in pair.args if isinstance(a, fx.Node) and isinstance(values[a], sites.Site))
    rank = values[node].dim()
    channel = int(pair.kwargs.get("channel", -1 if node.target is torch.nn.functional.linear else 1))
    claimed = sites.site_moments(values[site_node], rank, channel % rank)

    return Rule(Claim(functools.partial(rule.function, *rule.leading), claimed), rule.standing, rule.reason, rule.shaped)


@dataclass(frozen=True)
class Claim:
    """A rule that gives what a site claims.

    Attributes:
        layer: the rule of the layer with its effective weight.
        claimed: moments that the site answers for.
    """

    layer: Callable[..., Moments]
    claimed: Moments

    def __call__(self, *_: Any, **__: Any) -> Moments:
        """The claim, whatever comes in."""
        return self.claimed


def _affine(x: Moments, factor: Tensor, offset: Tensor) -> Moments:
    """``x · factor + offset``."""
    return x.scaled(factor).shifted(offset)
