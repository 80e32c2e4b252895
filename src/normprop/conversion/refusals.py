"""What `convert` refuses, and what it warns of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from normprop.conversion.lane import lanes_in
from normprop.conversion.placement import module_of
from normprop.conversion.site_plan import SitePlan, nodes_behind
from normprop.errors import NormPropError
from normprop.graph.walk import Walk

# Modules with hooks that compute a weight and own it.
_OWNERS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm", "torch.nn.utils.prune")
_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.jit.ScriptModule,
    torch.optim.swa_utils.AveragedModel,
)


def check_options(model: nn.Module, method: str, center: Any, preserve: Any, normalize: str) -> None:
    """Refuse what isn't a network to convert, or an option that isn't one.

    Raises:
        NormPropError: as it says.
    """
    if isinstance(model, torch.export.ExportedProgram):
        raise NormPropError(
            "convert takes the network itself, not an ExportedProgram of it.\nConvert it first, and export the result."
        )
    if not isinstance(model, nn.Module):
        raise NormPropError(f"convert takes a torch.nn.Module, not a {type(model).__name__}.")
    if isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        inner = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise NormPropError(
            f"convert takes the network itself, not a {type(model).__name__} of it.\n"
            f"Convert model.{inner} and wrap the result."
            if not isinstance(model, torch.jit.ScriptModule)
            else "convert takes a Python module, not a scripted one.\nConvert the module that was scripted."
        )
    if lanes_in(model) and not any(isinstance(m, _NormBase) for m in model.modules()) and normalize == "batchnorm":
        raise NormPropError("the network is converted already.")
    for name, value, allowed in (
        ("method", method, ("exact", "paper")),
        ("preserve", preserve, ("auto", True, False)),
        ("normalize", normalize, ("batchnorm", "all")),
    ):
        if value not in allowed:
            raise NormPropError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}.")
    if center != "auto" and not (isinstance(center, int | float) and 0 <= center <= 1):
        raise NormPropError(f"center={center!r} is neither 'auto' nor True, False, or a number from 0 to 1.")


def check_combination(method: str, center: Any, keep: bool) -> None:
    """Refuse options that contradict each other.

    Raises:
        NormPropError: as it says.
    """
    if keep and center not in ("auto", 0):
        raise NormPropError("centring changes what a trained network computes.\nPass preserve=False, or center=False.")
    if method == "paper" and keep:
        raise NormPropError(
            "the paper's form has no constants that could keep a trained function.\n"
            "Pass preserve=False to start fresh, or method='exact'."
        )
    if method == "paper" and center not in ("auto", 0):
        raise NormPropError("the paper does not centre its filters.\nPass method='exact' to centre them.")


def warn_of_uncentred(plans: Sequence[SitePlan]) -> None:
    """Centring was asked for, and some filters would be left with no response to a constant, or none at all."""
    paths = dict.fromkeys(plan.layer.path for plan in plans if plan.layer is not None and not plan.center)
    if paths:
        named = ", ".join(list(paths)[:5]) + (", …" if len(paths) > 5 else "")
        message = f"filters with one input channel are not centred: {named}\ncenter='auto' says the same without a warning."
        warnings.warn(message, stacklevel=3)


def check_statistics(root: nn.Module) -> None:
    """Refuse to keep the function of a network whose BatchNorms have no statistics of their own.

    Raises:
        NormPropError: naming the first.
    """
    for path, module in root.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is None:
            raise NormPropError(
                f"{path} keeps no running statistics: what it computes depends on the batch and cannot be kept.\n"
                "Pass preserve=False to start fresh."
            )


def refuse_nothing(root: nn.Module) -> None:
    """Say why there is nothing to convert.

    Raises:
        NormPropError: always.
    """
    if isinstance(root, torch.fx.GraphModule) and any("batch_norm" in str(node.target) for node in root.graph.nodes):
        raise NormPropError(
            f"this {type(root).__name__} is a graph whose BatchNorms are operations: there are no modules to convert.\n"
            "Convert the network that was exported or traced, and export the result."
        )
    left = [path for path, m in root.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if left:
        raise NormPropError(
            f"no BatchNorm ran in the recorded forward, {left[0]} among {len(left)} of them.\n"
            "Pass example= inputs with which they run, or convert the part that holds them, with in_place=True."
        )
    raise NormPropError("the network has no BatchNorm to convert.\nnormalize='all' gives every layer a site.")


def refuse_owned_weights(walk: Walk, plans: Sequence[SitePlan]) -> None:
    """Refuse old-style hooks that own a weight, in front of a site: what they compute is not theirs to give to a lane.

    Raises:
        NormPropError: naming each, and the parametrisation to use.
    """
    found: dict[str, str] = {}
    for node in nodes_behind(walk, plans, plans):
        if node.op != "module":
            continue
        for path, module in walk.module(node).named_modules(prefix=node.target):
            kinds = [type(hook) for hook in module._forward_pre_hooks.values() if type(hook).__module__ in _OWNERS]
            if kinds or (isinstance(module.__dict__.get("weight"), Tensor) and module._forward_pre_hooks):
                found[path] = kinds[0].__name__ if kinds else "a hook"
    if found:
        listed = ", ".join(f"{path} ({kind})" for path, kind in found.items())
        raise NormPropError(
            f"a hook owns the weight of {listed}.\n"
            "Use torch.nn.utils.parametrizations.weight_norm or spectral_norm; prune with parametrize, or make it permanent "
            "with torch.nn.utils.prune.remove."
        )


def refuse_computed_gains(root: nn.Module, paths: Iterable[str]) -> None:
    """Refuse BatchNorms whose γ or β something computes: sites learn theirs, and calibration writes to them.

    Args:
        root: the network.
        paths: of the BatchNorms that get sites.

    Raises:
        NormPropError: naming each.
    """
    found = [path for path in dict.fromkeys(paths) if _computes(module_of(root, path.split(".")))]
    if found:
        raise NormPropError(
            f"γ or β of {', '.join(found)} is computed by a parametrisation or a hook.\n"
            "Remove it, with torch.nn.utils.parametrize.remove_parametrizations for one; the layers before may keep theirs."
        )


def _computes(norm: nn.Module | None) -> bool:
    if norm is None:
        return False
    owned = any(type(hook).__module__ in _OWNERS for hook in norm._forward_pre_hooks.values())
    return owned or parametrize.is_parametrized(norm)
