"""What the program of a moment lane calls beside rules: parts of the network, and activations of several tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.rules.composed import Program as Composition
from normprop.rules.composed import composed
from normprop.rules.elementwise import module_activation, module_slope, named_activation, named_slope, natively_rectified
from normprop.sites.site import Site


def raw(module: nn.Module, name: str) -> Any:
    """A parameter of a module, also while an effective weight stands before it."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def site_at(parent: nn.Module, name: str, path: str) -> nn.Module:
    """The site of a path.

    Raises:
        NormPropError: something else is there now.
    """
    found = parent._modules.get(name)
    if isinstance(found, Site) and (found.path == path or path.endswith(f".{found.path}")):  # of a part with its own lane
        return found
    raise _replaced(path, Site, found)


def module_at(parent: nn.Module, name: str, path: str, kind: type[nn.Module]) -> nn.Module:
    """The module of a path, which runs the forward that was recorded.

    Raises:
        NormPropError: something else is there now.
    """
    found = parent._modules.get(name)
    if found is None or (type(found) is not kind and type(found).forward is not kind.forward):
        raise _replaced(path, kind, found)
    return found


def _replaced(path: str, kind: type, found: nn.Module | None) -> NormPropError:
    now = "nothing" if found is None else f"what was {found.path}" if isinstance(found, Site) else type(found).__name__
    return NormPropError(
        f"{path} was a {kind.__name__} that moments flow through when the network was converted; now it is {now}.\n"
        "Convert again, from the network with that change in it."
    )


def module_activations(modules: Sequence[nn.Module], *xs: Moments) -> list[Moments]:
    """`module_activation` of several tensors, each by its own module; these were equal when they were recorded."""
    first = modules[0]
    if not _equal_settings(modules):
        return [module_activation(m, x) for m, x in zip(modules, xs, strict=True)]
    slope = module_slope(first)
    natively = None if slope is None else natively_rectified(xs, slope)
    return natively or _apart(module_activation(first, _together(xs)), xs)


def _equal_settings(modules: Sequence[nn.Module]) -> bool:
    if type(modules[0]) is nn.ReLU:  # the one that has none, and small networks do little else
        return True
    first = settings_of(modules[0])
    return all(settings_of(m) == first for m in modules[1:])


def settings_of(module: nn.Module) -> dict[str, Any]:
    """What an activation module was made with."""
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in ("training", "inplace")}


def named_activations(
    name: str, parameters: tuple[str, ...], xs: Sequence[Moments], *args: Any, **kwargs: Any
) -> list[Moments]:
    """`named_activation` of several tensors."""
    slope = named_slope(name, parameters, xs[0], *args, **kwargs)
    natively = None if slope is None else natively_rectified(xs, slope)
    return natively or _apart(named_activation(name, parameters, _together(xs), *args, **kwargs), xs)


def composed_activations(
    xs: Sequence[Moments], program: Composition, bends: tuple[float, ...], jumps: tuple[float, ...]
) -> list[Moments]:
    """`composed` of several tensors, without operands."""
    return _apart(composed(_together(xs), program, bends, jumps), xs)


def _together(xs: Sequence[Moments]) -> Moments:
    dim = _common(xs)
    if dim is None:
        xs = [x.expanded(torch.broadcast_shapes(x.mean.shape, x.var.shape)) for x in xs]
        return Moments(torch.cat([x.mean.reshape(-1) for x in xs]), torch.cat([x.var.reshape(-1) for x in xs]))
    return Moments(torch.cat([x.mean for x in xs], dim), torch.cat([x.var for x in xs], dim))


def _apart(whole: Moments, xs: Sequence[Moments]) -> list[Moments]:
    dim = _common(xs)
    if dim is not None:
        sizes = [x.mean.shape[dim] for x in xs]
        return [Moments(*pair) for pair in zip(whole.mean.split(sizes, dim), whole.var.split(sizes, dim), strict=True)]
    shapes = [torch.broadcast_shapes(x.mean.shape, x.var.shape) for x in xs]
    sizes = [shape.numel() for shape in shapes]
    parts = zip(whole.mean.split(sizes), whole.var.split(sizes), shapes, strict=True)
    return [Moments(mean.reshape(shape), var.reshape(shape)) for mean, var, shape in parts]


def _common(xs: Sequence[Moments]) -> int | None:
    """The one dimension along which all of them vary, if there is such a dimension: they are joined and split along it."""
    rank = xs[0].mean.dim()
    varying = {d for x in xs for t in (x.mean, x.var) for d, size in enumerate(t.shape) if size > 1}
    alike = all(x.mean.shape == x.var.shape and x.mean.dim() == rank for x in xs)
    return varying.pop() if alike and len(varying) == 1 else None
