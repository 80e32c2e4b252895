"""What compiled segments can hold of a moment lane's operations, and as what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normprop.activations.compiled_curves import native_curve
from normprop.channel_moments import Moments
from normprop.conversion.activation_setting import Setting, module_setting, named_setting
from normprop.conversion.segment import Kind
from normprop.graph.node import Node, map_nodes, placed
from normprop.graph.node import run as run_target
from normprop.rules import arithmetic, combine, linear, pooling, reduction, shape
from normprop.rules.elementwise import module_activation, named_activation, named_parameters
from normprop.sites import site as sites
from normprop.sites.site import site_moments, site_scales

# Rules after which every element has the moments that it had.
_SAME = (shape.same, shape.same_module, shape.reshape, shape.reshape_module, shape.squeeze, shape.expand, shape.move)
# Rules that multiply mean and variance by one number each; k and c, where those of the result are k m and c v.
AVERAGES = (
    pooling.average_pool, pooling.functional_average_pool, pooling.adaptive_average_pool,
    pooling.functional_adaptive_average_pool, reduction.mean, reduction.total,
)  # fmt: skip
# Rules after which the mean is m + k√v, and the variance c v.
_LARGEST = (
    pooling.max_pool, pooling.functional_max_pool, pooling.adaptive_max_pool, pooling.functional_adaptive_max_pool,
    reduction.amax,
)  # fmt: skip
_MAPS = (linear.convolution, linear.linear)


def _vector(moments: Any) -> tuple[int, int] | None:
    """Along which dimension moments vary, and how many there are; None if along several."""
    if type(moments) is not Moments:
        return None
    full = shape_of(moments)
    varying = [d for d, size in enumerate(full) if size != 1]
    return (varying[0] if varying else -1, full.numel()) if len(varying) <= 1 else None


def is_held(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a segment can hold a node."""
    if node.op != "call":
        return False
    if node.target is site_scales:
        weight, site, moments, options = node.args[0]
        return moments is None or _fits_site(values[moments], values.get(weight), values[site], options)
    if _vector(values[node]) is None or values[node].mean.dtype not in (torch.float32, torch.float64):
        return False
    return kind_of(node, values) is not None


def _fits_site(moments: Any, weight: Tensor | None, site: Any, options: Any) -> bool:
    """Whether moments vary along the channels that a site reads, if at all."""
    found = _vector(moments)
    if found is None:
        return False
    count = site.num_features
    if weight is not None:
        count = weight.shape[0] if options.get("transposed_stride") else weight.shape[1] * options.get("groups", 1)
    dim, size = found
    return size == 1 or (size == count and dim == options["channel"] % moments.mean.dim())


def kind_of(node: Node, values: dict[Node, Any]) -> Kind | None:
    """What a node is for a segment, if it can hold it."""
    target = node.target
    sources = [n for n in node.inputs if isinstance(values.get(n), Moments)]
    if any(_vector(values[n]) is None for n in sources):
        return None
    if isinstance(values.get(node), Moments) and type(values[node]) is not Moments:
        return None  # of a kind that says more than mean and variance
    if target is sites.standard_normal:
        return Kind.STANDARD
    if target is site_moments:
        return Kind.SITE
    if target in (module_activation, named_activation):
        known = setting_of(node, values)
        return None if known is None else Kind.RECTIFIED if type(known) is float else Kind.CURVED
    if target in _MAPS:
        return Kind.MAPPED if _is_map(node, values, sources) else None
    if len(sources) == 1 and shape_of(values[node]).numel() == shape_of(values[sources[0]]).numel():
        if target in _SAME:
            return Kind.COPIED
        if target in AVERAGES:
            return Kind.SCALED
        if target in _LARGEST:
            return Kind.LARGEST
        if target is sites.widened:
            return Kind.WIDENED
    if getattr(target, "__name__", "") == "detached" and len(sources) == 1:
        return Kind.DETACHED
    if target in (arithmetic.add, arithmetic.sub):
        return _sum(node, sources)
    if target is arithmetic.mul:
        return _product(node, sources)
    if target is combine.cat and _is_joined(node, values):
        return Kind.READ  # its parts are copied to where it is
    return None


def setting_of(node: Node, values: dict[Node, Any]) -> Setting | None:
    """Which rectifier or compiled activation a node is, if it is one."""
    if node.target is module_activation:
        found = module_setting(values[node.args[0]])
    elif len(node.inputs) != 1 or not isinstance(values[node.inputs[0]], Moments):
        return None
    else:
        name, parameters, source, *rest = node.args
        found = named_setting(name, named_parameters(name, parameters, values[source], *rest, **node.kwargs))
    if type(found) is tuple and native_curve(*found, True) is None:
        return None
    return found


def _is_map(node: Node, values: dict[Node, Any], sources: Sequence[Node]) -> bool:
    """Whether a linear layer reads moments that vary along its channels, if at all."""
    module = values[node.args[0]]
    if len(node.args) != 2 or node.kwargs or len(sources) != 1 or not isinstance(module.weight, Tensor):
        return False
    dims = module.weight.dim() - 2
    found = _vector(values[sources[0]])
    assert found is not None
    count = module.weight.shape[1] * getattr(module, "groups", 1)
    return found[1] == 1 or found == (values[sources[0]].mean.dim() - 1 - dims, count)


def factors_of(node: Node, source: Node, values: dict[Node, Any]) -> tuple[float, float]:
    """Mean and variance that a node makes of 1 and 1 if it is an average, of 0 and 1 if it is a maximum."""
    like = values[source].mean
    ones = like.new_ones(like.shape, dtype=torch.float64)
    given = values | {source: Moments(ones if node.target in AVERAGES else torch.zeros_like(ones), ones)}
    args, kwargs = placed(map_nodes((node.args, node.kwargs), given.__getitem__), like.device)
    found = run_target(node.target, args, kwargs)
    return float(found.mean.flatten()[0]), float(found.var.flatten()[0])


def _sum(node: Node, sources: Sequence[Node]) -> Kind | None:
    if len(node.args) != 2 or set(node.kwargs) - {"alpha"}:
        return None
    if len(sources) == 2 and node.args[0] is not node.args[1]:
        return Kind.SUM
    return Kind.SCALED if len(sources) == 1 and node.args[0] is node.args[1] and node.target is arithmetic.add else None


def _product(node: Node, sources: Sequence[Node]) -> Kind | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    if len(sources) == 2:
        return Kind.PRODUCT
    numbers = [a for a in node.args if type(a) in (int, float)]
    return Kind.SCALED if len(sources) == 1 and len(numbers) == 1 else None


def _is_joined(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a concatenation joins channels, one part behind the other."""
    if len(node.args) != 2 or not isinstance(node.args[0], tuple | list):
        return False
    parts, dim = node.args
    shapes = node.kwargs["in_shapes"]
    rank = len(node.kwargs["out_shape"])
    if len(shapes) != len(parts) or not all(isinstance(p, Node) and isinstance(values.get(p), Moments) for p in parts):
        return False
    if any(_vector(values[p]) not in ((dim % rank, s[dim]), (-1, 1)) for p, s in zip(parts, shapes, strict=True)):
        return False
    return bool(dim % rank != 0)


def shape_of(moments: Moments) -> torch.Size:
    """The common shape of means and variances."""
    shape: torch.Size = torch.broadcast_shapes(moments.mean.shape, moments.var.shape)
    return shape
