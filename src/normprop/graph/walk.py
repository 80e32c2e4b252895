"""A traced model made ready for the rules: what each node is, which rule it has, how that rule is called."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from normprop import integrations
from normprop.channel_moments import Moments
from normprop.errors import NormPropError, TracingError, UnsupportedOpError
from normprop.graph.example_inputs import Shape, Shapes, example_values, model_inputs, sample_shape
from normprop.graph.fusion import Fused, Fusion
from normprop.graph.kind import Kind as Kind
from normprop.graph.sized import SizedTracer
from normprop.graph.trace import Leaf, LeafTracer, trace
from normprop.rules.composed import composed
from normprop.rules.table import TABLE, Key, Rule, RuleTable, Standing, describe


@dataclass(frozen=True)
class Walk:
    """A traced model with everything a walk needs.

    Attributes:
        graph_module: the trace; it shares the model's modules.
        values: node → value in a run on meta tensors.
        kinds: node → `Kind`.
        rules: rule of every DATA node that is neither an input nor the output; of those within composed functions where
            there is one.
        fused: nodes that are taken as one function of an earlier node, whatever operations lie between.
        missing: DATA nodes without a rule which are not merely part of a composed function, and why.
    """

    graph_module: fx.GraphModule
    values: Mapping[fx.Node, Any]
    kinds: Mapping[fx.Node, Kind]
    rules: Mapping[fx.Node, Rule]
    fused: Mapping[fx.Node, Fused] = field(default_factory=dict)
    missing: Mapping[fx.Node, str] = field(default_factory=dict)

    def inputs(self) -> list[tuple[Shape, torch.dtype]]:
        """Sample shape and dtype of each input."""
        return sample_shape(self.values, self.graph_module.graph)

    def shapes(self) -> list[Shape]:
        """Sample shape of each input."""
        return [shape for shape, _ in self.inputs()]

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a call_module node runs."""
        return self.graph_module.get_submodule(str(node.target))

    def call(
        self, node: fx.Node, moments_of: Callable[[fx.Node], Any], known: Callable[[fx.Node], Any], module: Any = None
    ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The rule's call for a node: function, arguments, keyword arguments.

        Args:
            node: a DATA node with a rule.
            moments_of: what stands for a DATA node (`Moments`, or the lane's node).
            known: what stands for a TENSOR node (the tensor, or the node itself).
            module: what stands for the module of a call_module node.
        """
        if node in self.fused:
            f = self.fused[node]
            operands = (known(operand) for operand in f.operands)
            return composed, (moments_of(f.source), f.program, f.bends, f.jumps, *operands), {}
        rule = self.rules[node]

        def replace(argument: fx.Node) -> Any:
            kind = self.kinds[argument]
            if kind is Kind.DATA:
                return moments_of(argument)
            return known(argument) if kind is Kind.TENSOR else self.values[argument]

        args = fx.node.map_arg(node.args, replace)
        kwargs = dict(fx.node.map_arg(node.kwargs, replace))
        if not args and "input" in kwargs:  # torch's name for a first tensor; rules take it by position
            args = (kwargs.pop("input"),)
        if rule.shaped:
            arguments = [t for n in self.data_arguments(node) for t in _tensors(self.values[n])]
            kwargs["in_shapes"] = tuple(tuple(t.shape) for t in arguments)
            value = self.values[node]
            kwargs["out_shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        first = (module,) if node.op == "call_module" else ()
        return rule.function, (*rule.leading, *first, *args), kwargs

    def data_arguments(self, node: fx.Node) -> list[fx.Node]:
        """The DATA nodes that a node's moments follow from, in order, once for every mention among its arguments."""
        if node in self.fused:
            return [self.fused[node].source]
        found: list[fx.Node] = []

        def collect(argument: fx.Node) -> fx.Node:
            if self.kinds[argument] is Kind.DATA:
                found.append(argument)
            return argument

        fx.node.map_arg((node.args, node.kwargs), collect)
        return found

    def standing(self, node: fx.Node) -> tuple[Standing, str]:
        """Standing of a node's rule for its arguments, and the reason."""
        return standing_for(node, self.rules[node], self.kinds)

    def require(self, nodes: Collection[fx.Node] | None = None) -> None:
        """Make sure that nodes have rules, all of them by default.

        Raises:
            UnsupportedOpError: some have none; all of these are named with their place and source line.
        """
        left = [(node, reason) for node, reason in self.missing.items() if nodes is None or node in nodes]
        if left:
            raise _unsupported(self, left)

    def place(self, node: fx.Node) -> str:
        """Module path of a node: its own if it calls a module, else that of the module whose forward it stands in."""
        return str(node.target) if node.op in ("call_module", "get_attr") else str(node.meta.get("scope", ""))

    def operation(self, node: fx.Node) -> str:
        """What a node does, for people."""
        if node.op == "call_module":
            return type(self.module(node)).__name__
        target = node.target
        return describe(target) if not isinstance(target, str) else (target if node.op == "placeholder" else f".{target}")


def standing_for(node: fx.Node, rule: Rule, kinds: Mapping[fx.Node, Kind]) -> tuple[Standing, str]:
    """Standing of a rule for a node's arguments, and the reason."""
    if rule.judge is None:
        return rule.standing, rule.reason
    stand_in: Any = lambda argument: Moments if kinds[argument] is Kind.DATA else argument
    args, kwargs = fx.node.map_arg(node.args, stand_in), dict(fx.node.map_arg(node.kwargs, stand_in))
    if not args and "input" in kwargs:
        args = (kwargs.pop("input"),)
    return rule.standing_for(*args, **kwargs)


def prepare(
    model: nn.Module,
    *,
    rules: Mapping[Key, Rule | Callable[..., Any]] | None = None,
    leaf_modules: Sequence[Leaf] = (),
    shape: Shapes | None = None,
) -> Walk:
    """Trace a model, run it on meta tensors and find every node's rule.

    Args:
        model: any module that torch.fx can trace.
        rules: overrides for this call.
        leaf_modules: modules to keep whole.
        shape: shape of one sample of the first input, or a sequence with one an input, if known.

    Returns:
        The walk; what has no rule is in its ``missing``, and `Walk.require` refuses it.

    Raises:
        TracingError: control flow on values, or no fitting input shape.
    """
    _check(model)
    integration = integrations.load_for(model)
    table = TABLE.with_overrides(rules)
    hint = integration.sample_shape(model)
    leaves = (*leaf_modules, *integration.leaf_modules)
    settings = (table, leaves, integration.leaf_functions, integration.expansions)
    try:
        graph_module = trace(model, LeafTracer(*settings))
    except TracingError as error:  # control flow, perhaps on sizes only
        inputs = _inputs_or(error, model, shape, hint)
        graph_module = trace(model, SizedTracer(inputs, *settings))
        shape = tuple(tuple(x.shape[1:]) for x in inputs)
    device = reference_tensor(model).device  # what a factory in the forward asks for is not the example's meta device
    found_values = example_values(graph_module, shape, hint)
    values = {n: device if isinstance(v, torch.device) else v for n, v in found_values.items()}
    kinds: dict[fx.Node, Kind] = {}
    for node in graph_module.graph.nodes:
        kinds[node] = _kind(node, values, kinds)
    found: dict[fx.Node, Rule] = {}
    missing: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        if kinds[node] is not Kind.DATA or node.op in ("placeholder", "output"):
            continue
        rule = rule_of(graph_module, node, table)
        standing, reason = ("unsupported", "no moment rule") if rule is None else standing_for(node, rule, kinds)
        if rule is None or standing == "unsupported":
            missing[node] = reason
        else:
            found[node] = rule
    return completed(graph_module, values, kinds, found, missing)


def rule_of(graph_module: fx.GraphModule, node: fx.Node, table: RuleTable) -> Rule | None:
    """The table's rule for what a node runs."""
    if node.op == "call_module":
        return table.for_module(graph_module.get_submodule(str(node.target)))
    return table.for_function(node.target)


def completed(
    graph_module: fx.GraphModule,
    values: dict[fx.Node, Any],
    kinds: dict[fx.Node, Kind],
    rules: dict[fx.Node, Rule],
    missing: Mapping[fx.Node, str],
) -> Walk:
    """The walk in which elementwise operations on one tensor are taken together.

    Args:
        graph_module: the trace; nodes may be added to its graph.
        values: node → value in the example run; grows with the graph.
        kinds: node → kind; as `values`.
        rules: node → rule, where the table has one; gets those of composed functions.
        missing: node → reason, where it has none.
    """
    fused = Fusion(graph_module, values, kinds, rules).run()
    rules |= {node: function.rule() for node, function in fused.items()}
    inner = inner_nodes(graph_module.graph, fused)
    left = {node: reason for node, reason in missing.items() if node not in fused and node not in inner}
    return Walk(graph_module, values, kinds, rules, fused, left)


def inner_nodes(graph: fx.Graph, fused: Mapping[fx.Node, Fused]) -> set[fx.Node]:
    """Nodes that appear within composed functions alone: nothing asks for their moments."""
    inner: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.users and all(u in inner or (u in fused and fused[u].source is not node) for u in node.users):
            inner.add(node)
    return inner


def _inputs_or(error: TracingError, model: nn.Module, shape: Shapes | None, hint: Shape | None) -> tuple[Tensor, ...]:
    """Example inputs of a model that plain tracing refused; its own error if none are found."""
    try:
        return model_inputs(model, shape, hint)
    except TracingError:
        raise error from None


def _kind(node: fx.Node, values: Mapping[fx.Node, Any], kinds: Mapping[fx.Node, Kind]) -> Kind:
    value = values.get(node)
    tensors = _holds_tensor(value)
    if node.op == "placeholder":
        return Kind.DATA if tensors else Kind.STATIC
    if node.op == "output":
        return Kind.DATA
    if not any(kinds[a] is Kind.DATA for a in node.all_input_nodes):
        static = not tensors and any(kinds[a] is Kind.STATIC for a in node.all_input_nodes)
        return Kind.STATIC if static else Kind.TENSOR
    return Kind.DATA if tensors else Kind.STATIC


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an operation's value: itself, or the entries of several."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple | list) else []


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, tuple | list):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, dict) and any(_holds_tensor(v) for v in value.values())


def _check(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            kind = type(module).__name__
            raise NormPropError(f"{path} is a {kind} that has not seen its input yet.\nRun one batch through it first.")


def _unsupported(walk: Walk, missing: Sequence[tuple[fx.Node, str]]) -> UnsupportedOpError:
    names = tuple(sorted({walk.operation(node) for node, _ in missing}))
    lines = [f"{len(names)} operation{'s' * (len(names) != 1)} without a moment rule: {', '.join(names)}"]
    for node, reason in missing:
        place = walk.place(node) or "the model itself"
        lines.append(f"  {walk.operation(node)} in {place} ({node.meta.get('source', '?')}): {reason}")
    lines.append("Register a rule with @normprop.rule(…), or pass rules={operation: function} for this call.")
    return UnsupportedOpError("\n".join(lines), names)


def reference_tensor(model: nn.Module) -> Tensor:
    """A floating tensor whose device and (at least float32) dtype the moments take."""
    tensor = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.zeros(()))
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    return torch.empty(0, dtype=wide, device=tensor.device)
