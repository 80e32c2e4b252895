"""A walk of a network that is converted already: its own graph, with what its sites claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from normprop.channel_moments import Moments
from normprop.conversion import layers
from normprop.conversion.converted import ConvertedModule
from normprop.conversion.lane import SiteCall, lane_nodes, site_calls
from normprop.graph.example_inputs import EXAMPLE_BATCH
from normprop.graph.trace import Leaf
from normprop.graph.walk import Kind, Walk, completed, prepare, rule_of, standing_for
from normprop.rules import linear
from normprop.rules.table import TABLE, Key, Rule
from normprop.sites import site as sites
from normprop.sites.reference import Scale


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
    lane, calls = lane_nodes(graph), site_calls(graph)
    values = _run(graph_module, model.example_inputs(EXAMPLE_BATCH), shape)
    kinds = {node: _kind(node, values.get(node), lane) for node in graph.nodes}
    table = TABLE.with_overrides(rules)
    found: dict[fx.Node, Rule] = {}
    missing: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if kinds[node] is not Kind.DATA or node.op in ("placeholder", "output"):
            continue
        rule = Rule(_LAYERS[node.target]) if node.target in _LAYERS else rule_of(graph_module, node, table)
        standing, reason = ("unsupported", "no moment rule") if rule is None else standing_for(node, rule, kinds)
        if rule is None or standing == "unsupported":
            missing[node] = reason
        else:
            found[node] = _claiming(node, rule, calls[node], values) if node in calls else rule
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


@torch.no_grad()
def _claiming(node: fx.Node, rule: Rule, call: SiteCall, values: Mapping[fx.Node, Any]) -> Rule:
    """The rule of a layer that a site answers for: N(β, γ²), whatever independence would predict."""
    rank = values[node].dim()
    (claimed,) = sites.site_moments((values[call.site], rank, call.options["channel"] % rank))
    return Rule(Claim(rule.function, claimed), rule.standing, rule.reason)


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


def _linear(x: Moments, scale: Scale) -> Moments:
    return linear.functional_linear(x, layers.scaled_weight(scale), scale.offset)


def _convolution(x: Moments, scale: Scale, *options: Any) -> Moments:
    return linear.functional_convolution(x, layers.scaled_weight(scale), scale.offset, groups=options[-1])


def _transposed(x: Moments, scale: Scale, *options: Any) -> Moments:
    weight = layers.scaled_weight(scale, transposed_groups=options[3])
    return linear.functional_transposed_convolution(x, weight, scale.offset, *options)


def _affine(x: Moments, scale: Scale, channel: int) -> Moments:
    """``x · factor + offset``."""
    factor, offset = layers.per_channel(scale, channel)
    return x.scaled(factor).shifted(offset)


_LAYERS: Mapping[Any, Callable[..., Moments]] = {
    layers.linear: _linear,
    layers.convolution: _convolution,
    layers.transposed_convolution: _transposed,
    layers.affine: _affine,
}
