"""A recorded network made ready for the rules: which rule each operation has, and how that rule is called."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from normprop import integrations
from normprop.channel_moments import Moments
from normprop.errors import NormPropError, TracingError, UnsupportedOpError
from normprop.graph.copies import meta_copy, running_copy
from normprop.graph.example_inputs import Inputs, Shape, Shapes, candidates, first_kinds, kinds_seen, no_inputs
from normprop.graph.fusion import Fused, Fusion
from normprop.graph.node import Node, map_nodes, nodes_in, placed, run
from normprop.graph.recorder import Leaf, Record, Recorder
from normprop.precision import reference_tensor
from normprop.rules import attention, pooling, reduction
from normprop.rules.composed import composed
from normprop.rules.elementwise import module_activation as activation
from normprop.rules.table import TABLE, Key, Rule, RuleTable, Standing, describe
from normprop.sites.site import Site, site_moments

# Rules of operations whose second result has no moments.
_HALF_KNOWN = frozenset([reduction.max_, reduction.min_, pooling.max_pool, pooling.max_pool_with_indices,
                         attention.multihead_attention])  # fmt: skip


@dataclass(frozen=True)
class Walk:
    """A recorded network with everything a walk needs.

    Attributes:
        model: the network itself, with values; paths in the record are its own.
        record: what it did.
        example: the inputs of the record, on the meta device.
        rules: rule of every operation on data; of those within composed functions where there is one.
        fused: nodes that are taken as one function of an earlier node, whatever operations lie between.
        missing: operations on data without a rule which are not merely part of a composed function, and why.
    """

    model: nn.Module
    record: Record
    example: Inputs
    rules: Mapping[Node, Rule]
    fused: Mapping[Node, Fused] = field(default_factory=dict)
    missing: Mapping[Node, str] = field(default_factory=dict)

    @property
    def nodes(self) -> list[Node]:
        """All operations, in order."""
        return self.record.nodes

    def inputs(self) -> list[tuple[Shape, torch.dtype]]:
        """Shape of a sample of each input, and its dtype."""
        return [(tuple(node.value.shape[1:]), node.value.dtype) for node in self.record.inputs]

    def shapes(self) -> list[Shape]:
        """Shape of a sample of each input."""
        return [tuple(node.value.shape[1:]) for node in self.record.inputs]

    def module(self, node: Node) -> nn.Module:
        """The module that a node runs."""
        return self.model.get_submodule(node.target)

    def known(self, node: Node) -> Any:
        """The present value of a node that is made of parameters and constants alone."""
        if node.op == "tensor":
            return attrgetter(node.target)(self.model)
        if node.op == "constant":
            return node.target
        args, kwargs = placed(map_nodes((node.args, node.kwargs), self.known), reference_tensor(self.model).device)
        if node.op == "module":
            return self.module(node)(*args, **kwargs)
        return run(node.target, args, kwargs)

    def call(
        self,
        node: Node,
        moments_of: Callable[[Node], Any],
        known: Callable[[Node], Any],
        module: Any = None,
        device: Any = None,
    ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The rule's call for a node: function, arguments, keyword arguments.

        Args:
            node: an operation on data with a rule.
            moments_of: what stands for a node that depends on data (`Moments`, or the lane's node).
            known: what stands for one that is made of parameters (the tensor, or the lane's node).
            module: what stands for the module of a module's node.
            device: what stands for the device that the network is on; by default that device.
        """
        if node in self.fused:
            f = self.fused[node]
            operands = (known(operand) for operand in f.operands)
            return composed, (moments_of(f.source), f.program, f.bends, f.jumps, *operands), {}
        rule = self.rules[node]
        args, kwargs = map_nodes((node.args, node.kwargs), lambda a: moments_of(a) if a.data else known(a))
        if not args and "input" in kwargs:  # torch's name for a first tensor; rules take it by position
            args = (kwargs.pop("input"),)
        if rule.shaped:
            arguments = [t for n in self.data_arguments(node) for t in tensors_in(n.value)]
            kwargs["in_shapes"] = tuple(tuple(t.shape) for t in arguments)
            kwargs["out_shape"] = tuple(node.value.shape) if isinstance(node.value, Tensor) else None
        kwargs = placed(kwargs, reference_tensor(self.model).device if device is None else device)
        first = (module,) if node.op == "module" else ()
        return rule.function, (*rule.leading, *first, *args), kwargs

    def data_arguments(self, node: Node) -> list[Node]:
        """The nodes that a node's moments follow from, in order, once for every mention among its arguments."""
        if node in self.fused:
            return [self.fused[node].source]
        return [n for n in nodes_in((node.args, node.kwargs)) if n.data]

    def standing(self, node: Node) -> tuple[Standing, str]:
        """Standing of a node's rule for its arguments, and the reason."""
        return standing_for(node, self.rules[node])

    def require(self, nodes: Collection[Node] | None = None) -> None:
        """Make sure that nodes have rules, all of them by default.

        Raises:
            UnsupportedOpError: some have none; all of these are named with their place and source line.
        """
        left = [(node, reason) for node, reason in self.missing.items() if nodes is None or node in nodes]
        if left:
            raise _unsupported(self, left)

    def operation(self, node: Node) -> str:
        """What a node does, for people."""
        if node.op == "module":
            return type(self.module(node)).__name__
        return node.target if node.op in ("input", "unseen") else operation_name(node.target)


def operation_name(target: Any) -> str:
    """A recorded function or method, for people."""
    if isinstance(target, str):
        return target if " " in target else f".{target}"
    return describe(target)


def standing_for(node: Node, rule: Rule) -> tuple[Standing, str]:
    """Standing of a rule for a node's arguments, and the reason."""
    if rule.judge is None:
        return rule.standing, rule.reason
    args, kwargs = map_nodes((node.args, node.kwargs), lambda n: Moments if n.data else n)
    if not args and "input" in kwargs:
        args = (kwargs.pop("input"),)
    return rule.standing_for(*args, **kwargs)


def prepare(
    model: nn.Module,
    *,
    rules: Mapping[Key, Rule | Callable[..., Any]] | None = None,
    leaf_modules: Sequence[Leaf] = (),
    shape: Shapes | None = None,
    example: Any = None,
    training: bool | None = None,
    few: bool = False,
    known: Walk | None = None,
) -> Walk:
    """Record a forward of a network and find every operation's rule.

    Args:
        model: any module. It is not run itself: a copy of it is.
        rules: overrides for this call.
        leaf_modules: modules to keep whole.
        shape: shape of one sample of the first input, or a sequence with one per input, if known.
        example: what the forward takes, if known: a tensor, a tuple of arguments, a dict of keyword arguments, `Inputs`.
        training: the mode to record; the model's own by default.
        few: try the usual sizes only.
        known: a walk of the same network with the same options, which is returned if the record is the same.

    Returns:
        The walk; what has no rule is in its ``missing``, and `Walk.require` refuses it.

    Raises:
        TracingError: no input was found that the network runs on.
    """
    _check(model)
    hint = integrations.load_for(model).sample_shape(model)
    recorder = lambda copy: recorder_for(copy, rules, leaf_modules)
    record, used = _recorded(_Copies(model, training), recorder, shape, hint, example, few)
    if known is not None and _signature(known.record) == _signature(record):
        return known
    return walk_over(model, record, used, _table(rules))


def recorder_for(
    model: nn.Module,
    rules: Mapping[Key, Rule | Callable[..., Any]] | None = None,
    leaf_modules: Sequence[Leaf] = (),
    observer: Callable[[str, Any], None] | None = None,
) -> Recorder:
    """A recorder that keeps whole what rules, the libraries that the model comes from, or the user want kept."""
    integration = integrations.load_for(model)
    leaves = (*leaf_modules, *integration.leaf_modules)
    expansions: dict[type[nn.Module], Callable[..., Any]] = {Site: expand_site, **integration.expansions}
    return Recorder(model, _table(rules), leaves, expansions, observer)


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


def _table(rules: Mapping[Key, Rule | Callable[..., Any]] | None) -> RuleTable:
    own: dict[Key, Rule | Callable[..., Any]] = {Site: Rule(site_rule)}
    own.update(rules or {})
    return TABLE.with_overrides(own)


def argument_names(model: nn.Module) -> list[str]:
    """The names of the forward's arguments, in order."""
    return [p.name for p in inspect.signature(model.forward).parameters.values()]


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


def _signature(record: Record) -> list[Any]:
    """What is equal for records of the same operations."""
    number = {node: i for i, node in enumerate(record.nodes)}
    name = lambda node: f"%{number[node]}"
    return [
        (n.op, _constant(n) if n.op == "constant" else n.target, n.detached, repr(map_nodes((n.args, n.kwargs), name)))
        for n in record.nodes
    ]


def _constant(node: Node) -> Any:
    """The values of a small constant; a large one is equal to none."""
    return (tuple(node.target.shape), node.target.flatten().tolist()) if node.target.numel() <= 64 else object()


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


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an operation's value: itself, or the entries of several."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, tuple | list) else []


def _run(
    recorder: Callable[[nn.Module], Recorder], copy: Callable[[], nn.Module], inputs: Inputs, names: Sequence[str]
) -> Record:
    """A record with gradients switched on, or off where the network can't do with them."""
    try:
        return recorder(copy()).run(inputs.args, inputs.kwargs, names)
    except RuntimeError:  # changes in place of what gradients need
        return recorder(copy()).run(inputs.args, inputs.kwargs, names, gradients=False)


class _Copies:
    """Copies of a network to be run, in one mode.

    Args:
        model: the network.
        training: the mode; the model's own for every module by default.
    """

    def __init__(self, model: nn.Module, training: bool | None) -> None:
        self.model, self.training = model, training

    def on_meta(self) -> nn.Module:
        """Without values."""
        return self._set(meta_copy(self.model))

    def real(self) -> nn.Module:
        """With values."""
        return self._set(running_copy(self.model))

    def _set(self, copied: nn.Module) -> nn.Module:
        return copied if self.training is None else copied.train(self.training)


def _recorded(
    copies: _Copies,
    recorder: Callable[[nn.Module], Recorder],
    shape: Shapes | None,
    hint: Shape | None,
    example: Any,
    few: bool,
) -> tuple[Record, Inputs]:
    """The record, and the inputs that it was made with."""
    model = copies.model
    names = argument_names(model)
    if example is not None:
        given = Inputs.of(example)
        on_meta = given.on_meta()
        try:
            return _run(recorder, copies.on_meta, on_meta, names), on_meta
        except Exception as error:
            real = given.random(reference_tensor(model)) if given.tensors() and given.tensors()[0].is_meta else given
            return _with_values(copies, recorder, real, names, error)
    copied = copies.on_meta()
    kinds, first, refined = first_kinds(copied), None, False
    guesses = candidates(copied, kinds, shape, hint, few=few)
    if not kinds:
        raise TracingError("a network without an input cannot be walked.")
    while (guess := next(guesses, None)) is not None:
        attempt = recorder(copied)
        try:
            return attempt.run(guess.args, guess.kwargs, names), guess
        except Exception as error:
            first = first or error
            if _asks_for_values(error):
                return _with_values(copies, recorder, guess.random(reference_tensor(model)), names, error)
            seen = kinds_seen(copied, attempt.record.inputs, attempt.pending)
            if not refined and len(seen) == len(kinds):
                refined = True
                guesses = candidates(
                    copied, [k if s is None else s for s, k in zip(seen, kinds, strict=True)], shape, hint, few=few
                )
    raise no_inputs(model, shape, first) from first


def _with_values(
    copies: _Copies, recorder: Callable[[nn.Module], Recorder], inputs: Inputs, names: Sequence[str], reason: Exception
) -> tuple[Record, Inputs]:
    """A record on real tensors, of a network that has values in Python's hands."""
    if reference_tensor(copies.model).is_meta:
        raise no_inputs(copies.model, None, reason) from reason
    try:
        return _run(recorder, copies.real, inputs, names), inputs.map(lambda t: t.to("meta"))
    except Exception as error:
        raise no_inputs(copies.model, tuple(tuple(t.shape) for t in inputs.tensors()), error) from error


def _asks_for_values(error: Exception) -> bool:
    """Whether a forward ended because the meta device has no values; torch has no type of its own for all such errors."""
    text = str(error)
    return isinstance(error, NotImplementedError) or any(
        w in text for w in ("meta tensor", "Meta tensor", "meta device", "data-dependent", "_local_scalar")
    )


def _check(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]  # torch types its self
            kind = type(module).__name__
            raise NormPropError(f"{path} is a {kind} that has not seen its input yet.\nRun one batch through it first.")


def _unsupported(walk: Walk, missing: Sequence[tuple[Node, str]]) -> UnsupportedOpError:
    names = tuple(sorted({walk.operation(node) for node, _ in missing}))
    lines = [f"{len(names)} operation{'s' * (len(names) != 1)} without a moment rule: {', '.join(names)}"]
    for node, reason in missing:
        lines.append(f"  {walk.operation(node)} in {node.scope or 'the model itself'} ({node.source or '?'}): {reason}")
    lines.append("Register a rule with @normprop.rule(…), or pass rules={operation: function} for this call.")
    return UnsupportedOpError("\n".join(lines), names)
