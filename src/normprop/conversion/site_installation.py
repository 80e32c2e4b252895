"""Sites put where BatchNorms were, and moments of inputs kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from normprop.conversion.batch_norms import is_frozen
from normprop.conversion.site_constants import Statistics
from normprop.conversion.site_plan import SitePlan
from normprop.graph.copies import put_module
from normprop.graph.input_moments import input_moments
from normprop.graph.walk import Walk
from normprop.precision import reference_tensor
from normprop.sites.site import Site

DIRECTIONS = 8  # as many as `calibrate` measures by default
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def install_sites(root: nn.Module, plans: Sequence[SitePlan]) -> tuple[nn.Module, dict[tuple[str, int], Statistics]]:
    """Put a `Site` at every planned path; returns what each call of a BatchNorm standardised by, by path and call.

    That is the running mean, less the layer's bias which the site takes away, and the running variance plus ε.
    """
    statistics: dict[tuple[str, int], Statistics] = {}
    like = reference_tensor(root)
    for path in dict.fromkeys(plan.path for plan in plans):
        own = [p for p in plans if p.path == path]
        calls, first = 1 + max(p.call for p in own), own[0]
        center = max(p.center for p in own)
        old: Any = None if first.bare else root.get_submodule(path)
        if old is None:
            assert first.layer is not None
            module: Any = root.get_submodule(first.layer.path)
            gamma, beta = (module.weight.new_full((first.layer.channels,), float(v)) for v in (1, 0))
            site = _site(first.layer.channels, calls, like, nn.Parameter(gamma), nn.Parameter(beta), center)
            site.train(root.training)
        else:
            for plan in own:
                if old.running_mean is not None and old.running_var is not None:
                    bias: Any = None if plan.layer is None else root.get_submodule(plan.layer.path).bias
                    mean = old.running_mean if bias is None else old.running_mean - bias.detach()
                    statistics[plan.key] = (mean, old.running_var + old.eps)
            channels = old.running_mean.numel() if is_frozen(old) else old.num_features
            site = _site(channels, calls, like, _trainable(old.weight), _trainable(old.bias), center)
            for key, child in old.named_children():  # the activation of a norm-act module
                site.add_module(key, child)
            _take_hooks(site, old)
            site.train(old.training)
        _allocate_directions(root, site, own)
        root = put_module(root, path, site)
    return root, statistics


def _take_hooks(site: Site, old: nn.Module) -> None:
    """Hooks that the user put on a BatchNorm."""
    for name in _HOOKS:
        site.__dict__[name] = old.__dict__[name]


def _trainable(tensor: Tensor | None) -> nn.Parameter | None:
    """γ or β: frozen normalisers hold them as buffers."""
    return tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().clone())


def _allocate_directions(root: nn.Module, site: Site, plans: Sequence[SitePlan]) -> None:
    """Zeros where calibration will put directions, so that copies made before it follow."""
    layers = {p.layer.path: p.layer for p in plans if p.layer is not None}
    if len(layers) != 1:
        return
    (layer,) = layers.values()
    weight: Any = root.get_submodule(layer.path).weight
    room = weight[0].numel() - (site.center == 1)
    count = min(DIRECTIONS, room - 1)
    if layer.transposed or count < 1:
        return
    shape: tuple[int, ...] = (layer.groups * count, *weight.shape[1:])
    shape = (len(site.shift), *shape) if site.shift.dim() == 2 else shape
    site.directions = nn.Parameter(site.scale.new_zeros(shape), requires_grad=False)


def _site(channels: int, calls: int, like: Tensor, weight: Any, bias: Any, center: float) -> Site:
    shape = (channels,) if calls == 1 else (calls, channels)
    return Site(weight, bias, like.new_zeros(shape), like.new_ones(shape), center=center)


def install_inputs(root: nn.Module, walk: Walk, given: Any) -> list[tuple[str, str] | None]:
    """Keep input moments that are not standard normal as constant parameters of the network."""
    if given is None:
        return [None] * len(walk.record.inputs)
    found = input_moments(walk.shapes(), given, reference_tensor(root))
    paths: list[tuple[str, str] | None] = []
    for i, moments in enumerate(found):
        if bool((moments.mean == 0).all()) and bool((moments.var == 1).all()):
            paths.append(None)
            continue
        name = f"input_moments_{i}" if len(found) > 1 else "input_moments"
        for part, value in (("mean", moments.mean), ("var", moments.var)):
            root.register_parameter(f"{name}_{part}", nn.Parameter(value.contiguous(), requires_grad=False))
        paths.append((f"{name}_mean", f"{name}_var"))
    return paths
