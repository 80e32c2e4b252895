"""A walk of any network; of one that is converted already with what its sites claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normprop.channel_moments import Moments
from normprop.conversion.lane import Lane, lanes_in
from normprop.graph.preparation import prepare
from normprop.graph.recorder import Leaf
from normprop.graph.walk import Walk
from normprop.rules import linear
from normprop.rules.table import Key, Rule
from normprop.sites.site import site_moments


def walk_of(
    model: nn.Module,
    *,
    rules: Mapping[Key, Rule | Callable[..., Any]] | None = None,
    leaf_modules: Sequence[Leaf] = (),
    shape: Any = None,
    example: Any = None,
) -> Walk:
    """The walk of any model, complete.

    Args:
        model: the network.
        rules: overrides for this call.
        leaf_modules: modules to keep whole.
        shape: shape of one sample, or one per input, if known.
        example: what its forward takes, if known.

    Raises:
        TracingError: no input was found that the network runs on.
        UnsupportedOpError: operations without a rule, all of them named.
    """
    lanes = lanes_in(model)
    if len(lanes) == 1 and lanes[0].root is model and example is None and shape is None:
        example = lanes[0].example
    walk = claimed(prepare(model, rules=rules, leaf_modules=leaf_modules, shape=shape, example=example))
    walk.require()
    return walk


def claimed(walk: Walk) -> Walk:
    """The walk with what the sites of its network claim at present."""
    claims = dict(_claims(walk, lanes_in(walk.model)))
    if not claims:
        return walk
    return Walk(walk.model, walk.record, walk.example, {**walk.rules, **claims}, walk.fused, walk.missing)


@torch.no_grad()
def _claims(walk: Walk, lanes: Sequence[Lane]) -> Any:
    """The rules of layers that sites answer for: N(β, γ²), whatever independence would predict."""
    for lane in lanes:
        prefix = next((name for name, module in walk.model.named_modules() if module is lane.root), "")
        layers = lane.layers[lane.root.training]
        calls: dict[str, int] = {}
        for node in walk.nodes:
            path = node.target.removeprefix(f"{prefix}.") if node.op == "module" and prefix else node.target
            if node.op != "module" or path not in layers:
                continue
            call = calls.get(path, 0)
            calls[path] = call + 1
            entry = layers[path][call] if call < len(layers[path]) else None
            if entry is None or node not in walk.rules:
                continue
            site: Any = lane.root.get_submodule(entry.site)
            rank = node.value.dim()
            channel = entry.options["channel"] % rank
            (claimed,) = site_moments((site, rank, channel))
            scale = lane.evaluate(lane.root, [entry])[entry.key]
            yield node, Rule(Claim(Effective(scale.weight, scale.offset), claimed))


@dataclass(frozen=True)
class Effective:
    """The rule of a layer with its effective weight."""

    weight: Any
    bias: Any

    def __call__(self, module: Any, x: Moments, *_: Any) -> Moments:
        """What the weight makes of the moments."""
        if isinstance(module, nn.Linear):
            return linear.functional_linear(x, self.weight, self.bias)
        if module.transposed:
            options = (module.stride, module.padding, module.output_padding, module.groups, module.dilation)
            return linear.functional_transposed_convolution(x, self.weight, self.bias, *options)
        return linear.functional_convolution(x, self.weight, self.bias, groups=module.groups)


@dataclass(frozen=True)
class Claim:
    """A rule that gives what a site claims.

    Attributes:
        layer: the rule of the layer with its effective weight.
        claimed: moments that the site answers for.
    """

    layer: Callable[..., Moments]
    claimed: Moments

    def __call__(self, *_: Any, **__: Any) -> Moments:
        """The claim, whatever comes in."""
        return self.claimed
