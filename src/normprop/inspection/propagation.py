"""Moments of every tensor of a network, without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.graph.input_moments import input_moments, sample_shapes
from normprop.graph.node import Node
from normprop.graph.recorder import Leaf
from normprop.graph.rule_search import inner_nodes, site_rule
from normprop.graph.walk import Walk
from normprop.inspection.assumptions import Assumptions, standing_of
from normprop.inspection.report import Report
from normprop.inspection.rewalk import Claim, walk_of
from normprop.inspection.roles import role_of, rule_function, rule_text, sources_of
from normprop.inspection.row import Row
from normprop.inspection.source_lines import SourceLines
from normprop.precision import reference_tensor
from normprop.rules import normalization
from normprop.rules.composed import squared_slope
from normprop.rules.table import Key, Rule

_NORMALISERS = frozenset(
    [normalization.batch_norm, normalization.functional_batch_norm, normalization.layer_norm, normalization.rms_norm,
     normalization.functional_layer_norm, normalization.group_norm, normalization.functional_group_norm,
     normalization.instance_norm, site_rule]
)  # fmt: skip


def propagate(
    model: nn.Module,
    input: Any = None,
    *,
    example: Any = None,
    rules: Mapping[Key, Rule | Callable[..., Any]] | None = None,
    leaf_modules: Sequence[Leaf] = (),
) -> Report:
    """Predicted mean and variance of every tensor of a network, and how a small change of the input grows.

    No data and no training: the moments of the input are carried through a record of the forward by the moment rules. A
    BatchNorm is taken at its word, N(β, γ²).

    Args:
        model: any network, also one that `convert` made. Its mode decides about dropout.
        input: moments of the input, `InputStats` or `Moments` (a sequence for several inputs); standard normal by default.
        example: what the model's forward takes, see `convert`; guessed by default.
        rules: moment rules for this call.
        leaf_modules: modules, classes or paths to keep whole.

    Returns:
        A `Report`, one row an operation.

    Raises:
        UnsupportedOpError: operations without a moment rule, all of them named.
        TracingError: no input was found that the network runs on.
        NormPropError: input moments that cannot be.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> [row.operation for row in normprop.propagate(net)]
        ['input', 'Linear', 'ReLU']
    """
    walk = walk_of(model, rules=rules, leaf_modules=leaf_modules, shape=sample_shapes(input), example=example)
    return Report(rows_of(walk, input_moments(walk.shapes(), input, reference_tensor(model))), type(model).__name__)


@torch.no_grad()
def rows_of(walk: Walk, inputs: list[Moments]) -> list[Row]:
    """The rows of a prepared walk from its inputs' moments on."""
    known: dict[Node, Any] = {}
    moments: dict[Node, Any] = {}
    change: dict[Node, Any] = {}
    rows: list[Row] = []
    names: dict[Node, str] = {}
    lines = SourceLines(walk.model)
    assumptions = Assumptions(walk)
    given = iter(inputs)
    inner = inner_nodes(walk.nodes, walk.fused)

    def value(node: Node) -> Any:
        """A tensor made of parameters alone, computed once."""
        if node not in known:
            known[node] = walk.known(node)
        return known[node]

    for node in walk.nodes:
        if not node.data or (node.op != "input" and node not in walk.rules):
            continue
        slope = None
        broken = assumptions.broken(node, moments)
        if node.op == "input":
            moments[node] = next(given)
            change[node] = moments[node].var
        else:
            module = walk.module(node) if node.op == "module" else None
            call = walk.call(node, moments.__getitem__, value, module)
            moments[node] = call[0](*call[1], **call[2])
            slope = squared_slope(call)
            change[node] = _gathered(_change(walk, node, call, moments, change, value, module, slope), moments[node])
        if isinstance(moments[node], Moments):
            if slope is not None:
                slope = slope * moments[walk.data_arguments(node)[0]].var.mean() / moments[node].var.mean()
            row = _row(walk, node, moments[node], slope, change[node], names, lines, broken)
            rows.append(replace(row, inner=node in inner))
            names[node] = node.name
    return rows


def _change(
    walk: Walk,
    node: Node,
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
    moments: Mapping[Node, Any],
    change: Mapping[Node, Any],
    known: Callable[[Node], Any],
    module: nn.Module | None,
    slope: Tensor | None,
) -> Any:
    """Variance of a small random change of the input when it arrives here.

    A scalar function multiplies it by E f'², a normaliser by what it multiplies the variance with; everything else is linear
    in the variance, so that the rule itself says what becomes of a little more of it.
    """
    sources = walk.data_arguments(node)
    if slope is not None:
        return slope * change[sources[0]]
    if call[0] in _NORMALISERS:
        before, after = moments[sources[0]], moments[node]
        if together := _together(before.var, after):
            before = before.pooled(together)  # what it divides by
        varies = before.var > 0
        return change[sources[0]] * torch.where(varies, after.var / torch.where(varies, before.var, 1.0), 0.0)
    function, args, kwargs = call
    function = function.layer if isinstance(function, Claim) else function
    step = min((_step(moments[source], change[source]) for source in sources), default=math.inf)
    step = step if step < math.inf else 0.01  # noise: no change of the input arrives here
    larger = {source: _larger(moments[source], change[source], step) for source in sources}
    _, changed, changed_kwargs = walk.call(node, larger.__getitem__, known, module)
    return _difference(function(*changed, **changed_kwargs), function(*args, **kwargs), step)


def _step(moments: Any, change: Any) -> float:
    """The share of a change that adds a hundredth to the variance."""
    if moments is None:
        return math.inf
    if isinstance(moments, Moments):
        growth = float(change.mean())
        return 0.01 * float(moments.var.mean()) / growth if growth > 0 else math.inf
    return min(_step(m, c) for m, c in zip(moments, change, strict=True))


def _larger(moments: Any, change: Any, step: float) -> Any:
    if moments is None:
        return None
    if isinstance(moments, Moments):
        return Moments(moments.mean, moments.var + step * change)
    return type(moments)(_larger(m, c, step) for m, c in zip(moments, change, strict=True))


def _gathered(change: Any, moments: Any) -> Any:
    """A change where the moments are: its mean over the dimensions along which they don't vary.

    Behind a normaliser, say, positions share one variance, though a change that arrives there differs from one to the next.
    """
    if change is None:
        return None
    if isinstance(moments, Moments):
        together = _together(change, moments)
        shape = torch.broadcast_shapes(moments.mean.shape, moments.var.shape)
        return (change.mean(together, keepdim=True) if together else change).expand(shape)
    return type(moments)(_gathered(c, m) for c, m in zip(change, moments, strict=True))


def _together(tensor: Tensor, moments: Moments) -> list[int]:
    """Dimensions along which a tensor varies and moments don't."""
    shape = torch.broadcast_shapes(moments.mean.shape, moments.var.shape)
    return [d for d in range(len(shape)) if shape[d] == 1 and tensor.shape[d] != 1]


def _difference(after: Any, before: Any, step: float) -> Any:
    if after is None:
        return None
    if isinstance(after, Moments):
        return ((after.var - before.var) / step).clamp(min=0.0)
    return type(after)(_difference(a, b, step) for a, b in zip(after, before, strict=True))


def _row(
    walk: Walk,
    node: Node,
    moments: Moments,
    slope: Tensor | None,
    change: Tensor,
    names: Mapping[Node, str],
    lines: SourceLines,
    broken: str,
) -> Row:
    rule = walk.rules.get(node)
    standing, reason = ("input", "") if rule is None else standing_of(walk, node, broken)
    variance = moments.var.mean().clamp(min=torch.finfo(moments.var.dtype).tiny)
    return Row(
        name=node.name,
        path=node.scope,
        operation="input" if rule is None else walk.operation(node),
        standing=standing,
        reason=reason,
        source=lines.of(node),
        shape=tuple(node.value.shape),
        predicted=Moments(moments.mean.detach(), moments.var.detach()),
        slope=None if slope is None else float(slope.mean()),
        sensitivity=float(change.mean() / variance),
        inputs=sources_of(walk, node, names),
        role=role_of(walk, node),
        rule=rule_text(rule_function(walk, node)),
    )
