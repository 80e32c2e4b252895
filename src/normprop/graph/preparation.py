"""A network's record with the rules of all operations, on inputs that were given or are found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from normprop import integrations
from normprop.errors import NormPropError, TracingError
from normprop.graph.copies import meta_copy, running_copy
from normprop.graph.example_inputs import Inputs, Shape, Shapes, candidates, first_kinds, kinds_seen, no_inputs
from normprop.graph.node import Node, map_nodes
from normprop.graph.record import Record
from normprop.graph.recorder import Leaf, Recorder
from normprop.graph.rule_search import expand_site, table_with, walk_over
from normprop.graph.walk import Walk
from normprop.precision import reference_tensor
from normprop.rules.table import Key, Rule
from normprop.sites.site import Site


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
    return walk_over(model, record, used, table_with(rules))


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
    return Recorder(model, table_with(rules), leaves, expansions, observer)


def argument_names(model: nn.Module) -> list[str]:
    """The names of the forward's arguments, in order."""
    return [p.name for p in inspect.signature(model.forward).parameters.values()]


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
