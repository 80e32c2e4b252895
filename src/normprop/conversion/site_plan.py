"""Where the normalisation sites of a network go."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from normprop.errors import NormPropError
from normprop.graph.node import Node
from normprop.graph.walk import Walk
from normprop.rules import normalization
from normprop.rules.linear import convolution, linear, transposed_convolution
from normprop.sites.site import Site

_LAYERS: dict[type[nn.Module], tuple[int, bool]] = {
    nn.Linear: (0, False),
    nn.Conv1d: (1, False), nn.Conv2d: (2, False), nn.Conv3d: (3, False),
    nn.ConvTranspose1d: (1, True), nn.ConvTranspose2d: (2, True), nn.ConvTranspose3d: (3, True),
}  # fmt: skip
_BATCH_NORMS = frozenset([normalization.batch_norm, normalization.frozen_batch_norm])


@dataclass(frozen=True)
class LinearLayer:
    """A convolution or linear layer that a site gives an effective weight and bias.

    Attributes:
        path: of the module.
        module: the layer itself.
        dims: number of spatial dimensions, 0 for a linear layer.
        transposed: a transposed convolution.
    """

    path: str
    module: Any
    dims: int
    transposed: bool

    @property
    def channel(self) -> int:
        """Channel dimension of its input and output, from the end."""
        return -1 - self.dims

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return int(self.module.out_features if self.dims == 0 else self.module.out_channels)

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 otherwise."""
        return int(getattr(self.module, "groups", 1))

    @property
    def transposed_stride(self) -> int:
        """Product of the strides of a transposed convolution, else 0."""
        return math.prod(self.module.stride) if self.transposed else 0

    @property
    def inputs(self) -> int:
        """Number of input channels that a filter reads."""
        return int(self.module.in_features if self.dims == 0 else self.module.in_channels) // self.groups

    @property
    def can_center(self) -> bool:
        """Whether a filter has something left without its mean: more than one weight, and more than one input channel."""
        return self.inputs > 1

    def options(self) -> dict[str, Any]:
        """What the arithmetic of a site depends on, defaults left out."""
        options: dict[str, Any] = {"channel": self.channel}
        if self.groups > 1:
            options["groups"] = self.groups
        if self.transposed:
            options["transposed_stride"] = self.transposed_stride
        return options


@dataclass(frozen=True)
class SitePlan:
    """One call of one site.

    Attributes:
        path: module path of the site.
        node: the node of the record whose value the site gives: a BatchNorm's, or a bare layer's.
        source: the node whose moments the site reads.
        layer: the layer that takes an effective weight; None for a per-channel affine.
        layer_call: which of that layer's calls it is.
        center: how much of their mean is taken from the filters.
        call: index among the calls of this site.
        eps: ε of the BatchNorm; 0 where there was none.
    """

    path: str
    node: Node
    source: Node
    layer: LinearLayer | None
    layer_call: int
    center: float
    call: int
    eps: float

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from all others."""
        return self.path, self.call

    @property
    def bare(self) -> bool:
        """Whether it stands behind a layer without a normaliser."""
        return self.layer is not None and self.node.op == "module" and self.node.target == self.layer.path

    def apart(self) -> SitePlan:
        """The same site as an affine of what the layer gives."""
        assert self.layer is not None
        return replace(self, source=argument(self.node), layer=None, layer_call=0, center=0.0)


def plan_sites(walk: Walk, normalize: Literal["batchnorm", "all"], center: float) -> list[SitePlan]:
    """The sites of a network, in the order of its record.

    Args:
        walk: the recorded model.
        normalize: "batchnorm" for a site in every BatchNorm's place; "all" for every linear layer besides, except those
            after which no other follows (the output layers).
        center: how much of their mean to take from the filters, wherever they have more than one input channel.
    """
    layers = {node: layer for node in walk.nodes if (layer := linear_layer(walk, node)) is not None}
    bare = _inner(walk.nodes, layers) if normalize == "all" else set()
    calls: Counter[str] = Counter()
    layer_calls = _call_numbers(walk.nodes)
    returned = set(map(id, _returned(walk)))
    plans: list[SitePlan] = []
    for node in walk.nodes:
        if is_batch_norm(walk, node):
            before = argument(node)
            layer = layers.get(before) if len(before.users) == 1 and id(before) not in returned else None
            if layer is not None and layer.channel % before.value.dim() != 1:
                layer = None  # tokens: BatchNorm's channels are not the layer's
            path, source = node.target, before if layer is None else argument(before)
            at, eps = before, float(getattr(walk.module(node), "eps", 0.0))
        elif node in bare and not any(is_batch_norm(walk, user) for user in node.users):
            layer, source, at = layers[node], argument(node), node
            eps = 0.0
            path = f"{layer.path}.site"
        else:
            continue
        centred = center if layer is not None and layer.can_center else 0.0
        plans.append(SitePlan(path, node, source, layer, 0 if layer is None else layer_calls[at], centred, calls[path], eps))
        calls[path] += 1
    return plans


def united(plans: dict[bool, list[SitePlan]]) -> dict[bool, list[SitePlan]]:
    """The plans of both modes, so that they agree about every site that both run.

    A site that one mode runs behind its layer and the other doesn't is an affine in both.
    """
    layers = {mode: {p.key: (p.layer and p.layer.path, p.layer_call) for p in of} for mode, of in plans.items()}
    torn = {key for key in layers[True].keys() & layers[False].keys() if layers[True][key] != layers[False][key]}
    return {mode: [p.apart() if p.key in torn and p.layer is not None else p for p in of] for mode, of in plans.items()}


def nodes_behind(walk: Walk, plans: Iterable[SitePlan], sites: Sequence[SitePlan]) -> set[Node]:
    """Nodes whose moments some site asks for: upstream of the sites, and no further than the sites before.

    Args:
        walk: the recorded model.
        plans: the sites that ask.
        sites: all sites of the record.
    """
    known = {plan.node for plan in sites}
    needed: set[Node] = set()
    stack = [plan.source for plan in plans]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in known and node.op != "input" and not is_site(walk, node):
                stack.extend(walk.data_arguments(node))
    return needed


def is_site(walk: Walk, node: Node) -> bool:
    """Whether a node is a site already: of a part that was converted before."""
    return node.op == "module" and isinstance(walk.module(node), Site)


def is_batch_norm(walk: Walk, node: Node) -> bool:
    """Whether a node is a BatchNorm module, or one whose statistics are frozen."""
    return node.op == "module" and node in walk.rules and walk.rules[node].function in _BATCH_NORMS


def argument(node: Node) -> Node:
    """The tensor that a layer or normaliser takes."""
    found = node.args[0] if node.args else next(iter(node.kwargs.values()))
    assert isinstance(found, Node)
    return found


def linear_layer(walk: Walk, node: Node) -> LinearLayer | None:
    """The layer that a node runs, if an attribute can give it a weight: torch's own forward, called with one argument.

    A weight that is computed (a parametrisation) is a property, which an attribute can't stand before.
    """
    if node.op != "module" or node not in walk.rules or len(node.args) + len(node.kwargs) != 1:
        return None
    module, function = walk.module(node), walk.rules[node].function
    base = next((c for c in type(module).__mro__ if c in _LAYERS and c.forward is type(module).forward), None)
    if base is None or function not in (convolution, transposed_convolution, linear) or "forward" in module.__dict__:
        return None
    if module._parameters.get("weight") is None or "bias" not in module._parameters or module._forward_hooks:
        return None
    if module._backward_hooks or module._backward_pre_hooks:
        return None
    dims, transposed = _LAYERS[base]
    return LinearLayer(node.target, module, dims, transposed)


def refuse_batch_statistics(walks: dict[bool, Walk], plans: dict[bool, list[SitePlan]]) -> None:
    """Make sure that nothing of a network looks at the batch once its sites are in place.

    Raises:
        NormPropError: functional batch normalisation, a normaliser with its own forward, one inside a leaf, instance
            normalisation with running statistics; each is named with its place.
    """
    found: dict[str, None] = {}
    for walk in walks.values():
        for node in walk.nodes:
            name = getattr(node.target, "__name__", str(node.target)) if node.op == "call" else ""
            if node.data and "batch_norm" in name and not _frozen(node):
                found[f"{name} in {node.scope or 'the model itself'} ({node.source})"] = None
        planned = {plan.path for of in plans.values() for plan in of}
        for path, module in walk.model.named_modules():
            if path in planned or path not in walk.record.called:
                continue
            kind = type(module).__name__
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                found[f"{path} ({kind}): its forward is its own, or it is inside a module that is kept whole"] = None
            elif isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
                found[f"{path} ({kind} with track_running_stats): evaluation depends on the batches it was trained on"] = (
                    None
                )
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise NormPropError(
            f"{len(found)} normaliser{'s' * (len(found) != 1)} would still look at the batch:\n{listed}\n"
            "Use torch's BatchNorm modules, with what comes after them in a module or a line of its own."
        )


def _frozen(node: Node) -> bool:
    """Whether functional batch normalisation uses given statistics: its ``training`` is False."""
    training = node.kwargs.get("training", node.args[5] if len(node.args) > 5 else False)
    statistics = node.kwargs.get("running_mean", node.args[1] if len(node.args) > 1 else None)
    return not training and statistics is not None


def _call_numbers(nodes: Sequence[Node]) -> dict[Node, int]:
    """For every module's node which of the module's calls it is."""
    calls: Counter[str] = Counter()
    numbers: dict[Node, int] = {}
    for node in nodes:
        if node.op == "module":
            numbers[node] = calls[node.target]
            calls[node.target] += 1
    return numbers


def _returned(walk: Walk) -> list[Node]:
    stack, found = [walk.record.output], []
    while stack:
        value = stack.pop()
        if isinstance(value, Node):
            found.append(value)
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, tuple | list):
            stack.extend(value)
    return found


def _inner(nodes: Sequence[Node], layers: dict[Node, LinearLayer]) -> set[Node]:
    """Linear layers after which another linear layer follows."""
    before: set[Node] = set()
    for node in reversed(nodes):
        if any(user in layers or user in before for user in node.users):
            before.add(node)
    return before & layers.keys()
