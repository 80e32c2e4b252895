"""What a compiled segment has to know of an activation: the slope of a rectifier, else name and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normprop.activations.catalogue import canonical
from normprop.errors import NormPropError
from normprop.rules.elementwise import rectifier_slope
from normprop.traced_constant import traced_constant

Setting = float | tuple[str, tuple[tuple[str, Any], ...]]

# Modules whose activation nothing in them changes.
_FIXED: dict[type[nn.Module], Setting] = {
    nn.ReLU: 0.0,
    **{kind: (kind.__name__.lower(), ()) for kind in (nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Mish)},
}


def present_setting(module: nn.Module) -> Setting:
    """The slope of a rectifier below zero, or the activation of another module.

    Raises:
        NormPropError: it has become something else.
    """
    fixed = _FIXED.get(type(module))
    found = module_setting(module) if fixed is None else fixed
    if found is None:
        raise NormPropError(f"the parameters of a {type(module).__name__} are no numbers any more.\nConvert again.")
    return found


def traced_setting(module: nn.Module) -> Setting:
    """`present_setting` where a graph is traced, as numbers that are none of the graph's variables.

    The graph is for these numbers only: it looks at them whenever it runs.
    """
    now, known = present_setting(module), _known_setting(module)
    if isinstance(now, float) and isinstance(known, float):
        return known if now == known else now
    assert isinstance(now, tuple)
    assert isinstance(known, tuple)
    same = all(value == other for (_, value), (_, other) in zip(now[1], known[1], strict=True))
    return known if same and now[0] == known[0] else now


@traced_constant
def _known_setting(module: nn.Module) -> Setting:
    return present_setting(module)


def module_setting(module: nn.Module) -> Setting | None:
    """The slope of a rectifier below zero, or name and parameters of another activation; None where these are learned."""
    known = canonical(module)
    return None if known is None else named_setting(*known)


def named_setting(name: str, parameters: Mapping[str, Any]) -> Setting | None:
    """The slope of a rectifier below zero, or name and parameters of another activation; None if these are no numbers."""
    slope = rectifier_slope(name, parameters)
    if slope is not None:
        return slope
    plain = all(type(value) in (int, float, str, bool) for value in parameters.values())
    return (name, tuple(sorted(parameters.items()))) if plain else None
