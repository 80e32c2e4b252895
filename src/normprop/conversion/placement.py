"""Whether layers and sites are where they were when the network was converted, with nothing between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from normprop.conversion.entry import Entry
from normprop.sites.site import Site


class Placement:
    """Entries whose layers and sites are where they were, for as long as no module on the way to them is another one.

    What hooks layers and sites have, which changes too, `is_bare` tells when they run: then they are in the caches, and
    looking at all of them beforehand takes a twentieth of a small network's step.

    Args:
        root: the network.
        entries: of a lane.

    Attributes:
        attached: those entries, as `is_attached` finds them.
        apart: the others.
        sites: of those, as far as they are called.
    """

    def __init__(self, root: nn.Module, entries: Sequence[Entry]) -> None:
        self.root = root
        self.attached = [entry for entry in entries if is_attached(root, entry)]
        self.apart = [entry for entry in entries if entry not in self.attached]
        self.sites = [None if entry.bare else module_of(root, entry.site_names) for entry in self.attached]
        ways = (names for entry in entries for names in (entry.site_names, entry.layer_names))
        edges = dict.fromkeys(names[:end] for names in ways for end in range(1, len(names) + 1))
        self._edges = [(parent, names[-1]) for names in edges if (parent := module_of(root, names[:-1])) is not None]
        self._modules = self._present()

    def holds(self, root: nn.Module) -> bool:
        """Whether a network is the same, of the same modules, and what stood between a layer and its site is there still."""
        if root is not self.root or self._present() != self._modules:
            return False
        return not any(is_attached(root, entry) for entry in self.apart)

    def _present(self) -> list[Any]:
        return [parent._modules.get(name) for parent, name in self._edges]


def is_attached(root: nn.Module, entry: Entry) -> bool:
    """Whether a layer is where it was, so that its effective weight will be asked for as such."""
    if entry.layer is None:
        site = module_of(root, entry.site_names)
        return isinstance(site, Site) and site.path == entry.site
    layer = module_of(root, entry.layer_names)
    return layer is not None and is_bare(layer, None if entry.bare else module_of(root, entry.site_names))


def is_plain(root: nn.Module, entry: Entry, layer: nn.Module) -> bool:
    """Whether nothing stands between a layer and its site: no wrapper, hook, own forward or computed weight."""
    assert entry.layer is not None
    found = module_of(root, entry.layer_names)
    return found is layer and is_bare(layer, None if entry.bare else module_of(root, entry.site_names))


def is_covered(layer: nn.Module) -> bool:
    """Whether an attribute can give a layer its weight: it has a hook of ours, and a weight that is a parameter."""
    for hook in layer._forward_pre_hooks.values():
        if getattr(hook, "covers", False):
            return layer._parameters.get("weight") is not None or "_is_replica" in layer.__dict__
    return False


def is_bare(layer: nn.Module, site: nn.Module | None) -> bool:
    """`is_plain` of a layer and a site that are where they were; None for a site that nothing calls."""
    own = layer.__dict__
    if own["_backward_hooks"] or own["_backward_pre_hooks"] or "forward" in own:
        return False
    hooks = own["_forward_hooks"]  # one of a covered layer's is ours
    if not is_covered(layer) or (len(hooks) > 1 and not _are_ours(hooks)):
        return False
    if site is None:
        return True
    return not (site._backward_hooks or site._backward_pre_hooks) and _are_ours(site._forward_pre_hooks)


def _are_ours(hooks: Mapping[int, Any]) -> bool:
    return not hooks or all(getattr(hook, "unrecorded", False) for hook in hooks.values())


def module_of(root: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """The module of a path that was taken apart; None if there is none."""
    module = root
    for name in names:
        inside = module._modules.get(name)
        if inside is None:
            return None
        module = inside
    return module
