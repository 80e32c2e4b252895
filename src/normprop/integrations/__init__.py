"""What other libraries' models need: leaves, rules, shapes. Each is imported only when a model comes from its library."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Integration:
    """What a library adds to a walk.

    Attributes:
        leaf_modules: classes to keep whole.
        expansions: class → function ``(module, call, *inputs)`` that runs a module as several: ``call(compute, *inputs)``
            computes the part that goes by the module's own path, the rest is modules inside it.
        shape_of: model → shape of one input sample, where the library records it.
    """

    leaf_modules: tuple[type[nn.Module], ...] = ()
    expansions: dict[type[nn.Module], Callable[..., Any]] = field(default_factory=dict)
    shape_of: Callable[[nn.Module], Shape | None] = lambda _: None

    def sample_shape(self, model: nn.Module) -> Shape | None:
        """Shape of one input sample as the model's library records it."""
        return self.shape_of(model)


_LIBRARIES = {"timm": "normprop.integrations.timm"}


def load_for(model: nn.Module) -> Integration:
    """The integrations of all libraries that the model's modules come from, as one."""
    roots = {type(m).__module__.partition(".")[0] for m in model.modules()}
    found: list[Integration] = [
        importlib.import_module(_LIBRARIES[root]).INTEGRATION for root in sorted(roots & _LIBRARIES.keys())
    ]
    if not found:
        return Integration()
    return Integration(
        leaf_modules=tuple(c for f in found for c in f.leaf_modules),
        expansions={k: v for f in found for k, v in f.expansions.items()},
        shape_of=lambda m: next((s for f in found if (s := f.shape_of(m)) is not None), None),
    )
