"""Whether layers and sites are where they were when the network was converted, with nothing between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from normprop.conversion.entry import Entry
from normprop.sites.site import Site


def is_attached(root: nn.Module, entry: Entry) -> bool:
    """Whether a layer is where it was, so that its effective weight will be asked for as such."""
    if entry.layer is None:
        site = _found(root, entry.site_names)
        return isinstance(site, Site) and site.path == entry.site
    layer = _found(root, entry.layer_names)
    return layer is not None and _is_bare(root, entry, layer)


def is_plain(root: nn.Module, entry: Entry, layer: nn.Module) -> bool:
    """Whether nothing stands between a layer and its site: no wrapper, hook, own forward or computed weight."""
    assert entry.layer is not None
    return _found(root, entry.layer_names) is layer and _is_bare(root, entry, layer)


def is_covered(layer: nn.Module) -> bool:
    """Whether an attribute can give a layer its weight: it has a hook of ours, and a weight that is a parameter."""
    for hook in layer._forward_pre_hooks.values():
        if getattr(hook, "covers", False):
            return layer._parameters.get("weight") is not None or "_is_replica" in layer.__dict__
    return False


def _is_bare(root: nn.Module, entry: Entry, layer: nn.Module) -> bool:
    """`is_plain` of a layer that is where it was."""
    if not is_covered(layer) or layer._backward_hooks or layer._backward_pre_hooks or "forward" in layer.__dict__:
        return False
    if not _are_ours(layer._forward_hooks):
        return False
    site = None if entry.bare else _found(root, entry.site_names)
    if site is None:
        return True
    return not (site._backward_hooks or site._backward_pre_hooks) and _are_ours(site._forward_pre_hooks)


def _are_ours(hooks: Mapping[int, Any]) -> bool:
    return not hooks or all(getattr(hook, "unrecorded", False) for hook in hooks.values())


def _found(root: nn.Module, names: Sequence[str]) -> nn.Module | None:
    module = root
    for name in names:
        inside = module._modules.get(name)
        if inside is None:
            return None
        module = inside
    return module
