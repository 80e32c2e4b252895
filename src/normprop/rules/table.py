"""The table of moment rules: operation → what it does to `Moments`."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from normprop.errors import NormPropError

Standing = Literal["exact", "approximate", "unsupported"]
Key = type | Callable[..., Any] | str
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """How one operation acts on moments.

    Attributes:
        function: called like the operation itself, with `Moments` in place of every tensor that depends on the input
            (a module's rule gets the module first).
        standing: "exact" under the assumptions (independent, Gaussian where a nonlinearity needs it), "approximate",
            or "unsupported" on purpose.
        reason: why it is approximate or unsupported.
        shaped: the rule also wants ``in_shapes`` (one per `Moments` argument) and ``out_shape``, static tuples of an
            example run whose batch size is `EXAMPLE_BATCH`.
        training_only: the operation is the identity in eval mode, and so is its part in the moment lane.
        leading: arguments that go before the operation's own, for one function which serves many operations.
        judge: called like the operation, with the class `Moments` in place of every tensor that depends on the input;
            gives standing and reason where the arguments decide them, else None.
    """

    function: Callable[..., Any]
    standing: Standing = "exact"
    reason: str = ""
    shaped: bool = False
    training_only: bool = False
    leading: tuple[Any, ...] = ()
    judge: Callable[..., tuple[Standing, str] | None] | None = None

    def standing_for(self, *args: Any, **kwargs: Any) -> tuple[Standing, str]:
        """Standing and reason of one call; the arguments are those of `judge`."""
        judged = self.judge(*args, **kwargs) if self.judge is not None else None
        return judged or (self.standing, self.reason)


class RuleTable(Mapping[Key, Rule]):
    """A mapping from operation to rule which refuses duplicates and looks modules up along their MRO.

    Keys are module classes, functions, and names: a name without a dot is a tensor method, one with dots the qualified
    name of a class or function of a library that need not be installed.
    """

    def __init__(self, rules: Mapping[Key, Rule] | None = None) -> None:
        self._rules: dict[Key, Rule] = dict(rules or {})

    def __getitem__(self, key: Key) -> Rule:
        return self._rules[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def add(self, key: Key, rule: Rule) -> None:
        """Register a rule; NormPropError if the operation has one already."""
        if key in self._rules:
            raise NormPropError(f"{describe(key)} already has a moment rule.\nPass rules={{…}} to override it for a call.")
        self._rules[key] = rule

    def for_module(self, module: nn.Module) -> Rule | None:
        """The rule of the nearest base class whose ``forward`` the module really runs."""
        for base in type(module).__mro__:
            rule = self._rules.get(base) or self._rules.get(qualified_name(base))
            if rule is not None and getattr(base, "forward", None) is _forward_of(module):
                return rule
        return None

    def for_function(self, function: Callable[..., Any] | str) -> Rule | None:
        """The rule of a function, or of a tensor method given by its name; a named tuple only collects its entries."""
        if inspect.isclass(function) and issubclass(function, tuple):
            return Rule(function)
        if isinstance(function, str):
            return self._rules.get(function)
        return self._rules.get(function) or self._rules.get(qualified_name(function))

    def with_overrides(self, rules: Mapping[Key, Rule | Callable[..., Any]] | None) -> RuleTable:
        """A table in which `rules` go first; bare functions are taken as exact rules."""
        if not rules:
            return self
        merged = dict(self._rules)
        merged.update({k: r if isinstance(r, Rule) else Rule(r) for k, r in rules.items()})
        return RuleTable(merged)


def _forward_of(module: nn.Module) -> Any:
    # A wrapper such as fully_shard or parametrize makes a subclass but keeps `forward`; an instance may also carry its own.
    own = module.__dict__.get("forward")
    return own if own is not None else type(module).forward


def qualified_name(key: Callable[..., Any] | type) -> str:
    """``package.module.Name`` of a class or function."""
    return f"{getattr(key, '__module__', None)}.{getattr(key, '__qualname__', getattr(key, '__name__', repr(key)))}"


def describe(key: Key) -> str:
    """An operation's name for people."""
    if isinstance(key, str):
        return f"Tensor.{key}" if "." not in key else key
    return _public_names().get(id(key)) or qualified_name(key).removeprefix("builtins.")


@functools.cache
def _public_names() -> dict[int, str]:
    """The names under which torch's and Python's functions are imported; they carry others, of where they are kept."""
    spaces = (torch, torch.nn.functional, torch.special, torch.linalg, torch.fft, operator)
    names: dict[int, str] = {}
    for space in spaces:
        for name, value in vars(space).items():
            if callable(value) and not isinstance(value, type) and name[0] != "_":
                names.setdefault(id(value), f"{space.__name__}.{name}")
    return names


TABLE = RuleTable()


def rule(
    *keys: Key,
    standing: Standing = "exact",
    reason: str = "",
    shaped: bool = False,
    training_only: bool = False,
    judge: Callable[..., tuple[Standing, str] | None] | None = None,
) -> Callable[[Function], Function]:
    """Register the decorated function as the moment rule of one or several operations.

    The function is called like the operation, with `Moments` in place of tensors that depend on the network's input; a
    rule for a module class receives the module first. It must be made of differentiable torch operations, and must be
    importable (no lambda, nothing local) if the converted network is to be pickled.

    Args:
        keys: module classes, functions, tensor method names, or dotted names of classes and functions.
        standing: "exact" under the assumptions, "approximate", or "unsupported".
        reason: why; required unless exact.
        shaped: call the rule with keywords ``in_shapes`` and ``out_shape`` too.
        training_only: the operation is the identity in eval mode.
        judge: gives ``(standing, reason)`` of calls whose arguments decide them, see `Rule`.

    Raises:
        NormPropError: a key has a rule already, or a reason is missing.

    Example:
        >>> import torch, normprop
        >>> class Double(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> @normprop.rule(Double)
        ... def double(module, x):
        ...     return x.scaled(2.0)
    """
    if standing != "exact" and not reason:
        raise NormPropError(f"a rule that is {standing} must say why.\nPass reason='…'.")

    def register(function: Function) -> Function:
        for key in dict.fromkeys(keys):  # torch gives some functions two names
            TABLE.add(key, Rule(function, standing, reason, shaped, training_only, judge=judge))
        return function

    return register


def unsupported(*keys: Key, reason: str) -> None:
    """Register operations which are refused on purpose, with the reason that the error will give."""
    for key in keys:
        TABLE.add(key, Rule(_refuse, "unsupported", reason))


def _refuse(*_: Any, **__: Any) -> Any:
    raise NormPropError("this operation is unsupported on purpose")  # the walk reports it before it could be called
