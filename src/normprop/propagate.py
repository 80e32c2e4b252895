"""Moments of every tensor of a network, without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward
from torch import Tensor, fx, nn

from normprop.channel_moments import Moments
from normprop.report import Report, Row
from normprop.rules import elementwise, normalization
from normprop.rules.table import Key, Rule
from normprop.trace import Leaf
from normprop.walk import Kind, Walk, input_moments, prepare, reference_tensor

_NORMALISERS = frozenset(
    [normalization.batch_norm, normalization.functional_batch_norm, normalization.layer_norm, normalization.rms_norm,
     normalization.functional_layer_norm, normalization.group_norm, normalization.functional_group_norm,
     normalization.instance_norm]
)  # fmt: skip


def propagate(
    model: nn.Module,
    input: Any = None,
    *,
    rules: Mapping[Key, Rule | Callable[..., Any]] | None = None,
    leaf_modules: Sequence[Leaf] = (),
) -> Report:
    """Predicted mean and variance of every tensor of a network, and how a small change of the input grows.

    No data and no training: the moments of the input are carried through the traced graph by the moment rules. A
    BatchNorm is taken at its word, N(β, γ²).

    Args:
        model: a network that torch.fx can trace, or one that `convert` made. Its mode decides about dropout.
        input: moments of the input, `InputStats` or `Moments` (a sequence for several inputs); standard normal by default.
        rules: moment rules for this call.
        leaf_modules: modules, classes or paths that tracing must not enter.

    Returns:
        A `Report`, one row an operation.

    Raises:
        UnsupportedOpError: operations without a moment rule, all of them named.
        TracingError: control flow on values.
        NormPropError: input moments that cannot be.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> [row.operation for row in normprop.propagate(net)]
        ['input', 'Linear', 'ReLU']
    """
    shape = getattr(input, "shape", None)
    walk = prepare(model, rules=rules, leaf_modules=leaf_modules, shape=tuple(shape) if shape else None)
    return Report(_rows(walk, input_moments(walk, input, reference_tensor(model))), type(model).__name__)


@torch.no_grad()
def _rows(walk: Walk, inputs: list[Moments]) -> list[Row]:
    interpreter = fx.Interpreter(walk.graph_module, garbage_collect_values=False)
    known: dict[fx.Node, Any] = {}
    moments: dict[fx.Node, Any] = {}
    change: dict[fx.Node, Any] = {}
    rows: list[Row] = []
    given = iter(inputs)
    for node in walk.graph_module.graph.nodes:
        kind = walk.kinds[node]
        if kind is Kind.TENSOR:
            known[node] = _value(interpreter, walk, node, known)
        if kind is not Kind.DATA or node.op == "output":
            continue
        slope = None
        if node.op == "placeholder":
            moments[node] = next(given)
            change[node] = moments[node].var
        else:
            module = walk.module(node) if node.op == "call_module" else None
            call = walk.call(node, moments.__getitem__, known.__getitem__, module)
            moments[node] = call[0](*call[1], **call[2])
            full = elementwise.full_moments(call)
            slope = None if full is None else full.slope
            change[node] = _change(walk, node, call, moments, change, known, module, slope)
        if isinstance(moments[node], Moments):
            if slope is not None:
                slope = slope * moments[walk.data_arguments(node)[0]].var.mean() / moments[node].var.mean()
            rows.append(_row(walk, node, moments[node], slope, change[node]))
    return rows


def _value(interpreter: fx.Interpreter, walk: Walk, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """A tensor made of parameters alone, computed."""
    fetch = lambda a: known[a] if walk.kinds[a] is Kind.TENSOR else walk.values[a]
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), fetch)
    return getattr(interpreter, node.op)(node.target, args, kwargs)


def _change(
    walk: Walk,
    node: fx.Node,
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
    moments: Mapping[fx.Node, Any],
    change: Mapping[fx.Node, Any],
    known: Mapping[fx.Node, Any],
    module: nn.Module | None,
    slope: Tensor | None,
) -> Any:
    """Variance of a small random change of the input when it arrives here.

    A scalar function multiplies it by E f'², a normaliser by what it multiplies the variance with; everything else is linear
    in the variance, so that the rule's own derivative carries the change.
    """
    sources = walk.data_arguments(node)
    if slope is not None:
        return slope * change[sources[0]]
    if call[0] in _NORMALISERS:
        before, after = moments[sources[0]].var, moments[node].var
        return change[sources[0]] * (after.mean() / before.mean().clamp(min=torch.finfo(before.dtype).tiny))
    with forward.dual_level():
        dual = {n: _dual(moments[n], change[n]) for n in dict.fromkeys(sources)}
        function, args, kwargs = walk.call(node, dual.__getitem__, known.__getitem__, module)
        return _tangent(function(*args, **kwargs))


def _dual(moments: Any, change: Any) -> Any:
    if isinstance(moments, Moments):
        mean, var = torch.broadcast_tensors(moments.mean, moments.var)
        return Moments(mean, forward.make_dual(var.contiguous(), change.expand_as(var).contiguous()))
    return type(moments)(_dual(m, c) for m, c in zip(moments, change, strict=True))


def _tangent(result: Any) -> Any:
    if isinstance(result, Moments):
        primal, tangent = forward.unpack_dual(result.var)
        return torch.zeros_like(primal) if tangent is None else tangent
    return type(result)(_tangent(r) for r in result)


def _row(walk: Walk, node: fx.Node, moments: Moments, slope: Tensor | None, change: Tensor) -> Row:
    rule = walk.rules.get(node)
    variance = moments.var.mean().clamp(min=torch.finfo(moments.var.dtype).tiny)
    return Row(
        name=node.name,
        path=walk.place(node),
        operation="input" if rule is None else walk.operation(node),
        standing="input" if rule is None else rule.standing,
        reason="" if rule is None else rule.reason,
        source=str(node.meta.get("source", "")),
        shape=tuple(walk.values[node].shape),
        predicted=moments,
        slope=None if slope is None else float(slope.mean()),
        sensitivity=float(change.mean() / variance),
    )
