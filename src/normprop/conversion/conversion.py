"""BatchNorm network in, NormProp network out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normprop.conversion.agreement import Agreement
from normprop.conversion.attachment import Unrecorded, attach
from normprop.conversion.calibration import Statistics, preserve_
from normprop.conversion.fingerprint import set_fingerprints_
from normprop.conversion.initial_values import initial_values
from normprop.conversion.lane import Entry, Lane, lanes_in
from normprop.conversion.lane_writer import LaneWriter, passing_noise
from normprop.conversion.paper_form import start_as_printed_
from normprop.conversion.site_plan import SitePlan, nodes_behind, plan_sites, refuse_batch_statistics, united
from normprop.errors import NormPropError, TracingError
from normprop.graph.copies import independent_copy, put_module
from normprop.graph.input_moments import input_moments, sample_shapes
from normprop.graph.recorder import Leaf
from normprop.graph.walk import Walk, prepare
from normprop.native.operands import prepare as prepare_native
from normprop.precision import reference_tensor
from normprop.rules import normalization
from normprop.rules.table import TABLE, Key, Rule
from normprop.sites.site import Site

DIRECTIONS = 8  # as many as `calibrate` measures by default
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
# Modules with hooks that compute a weight and own it.
_OWNERS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm", "torch.nn.utils.prune")
_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.jit.ScriptModule,
    torch.optim.swa_utils.AveragedModel,
)


def convert(
    model: nn.Module,
    input: Any = None,
    *,
    example: Any = None,
    method: Literal["exact", "paper"] = "exact",
    center: Literal["auto"] | bool = "auto",
    preserve: Literal["auto"] | bool = "auto",
    normalize: Literal["batchnorm", "all"] = "batchnorm",
    rules: Mapping[Key, Rule | Callable[..., Any]] | None = None,
    leaf_modules: Sequence[Leaf] = (),
    in_place: bool = False,
) -> nn.Module:
    """The network with computed statistics in place of batch statistics: the same class, which runs its own forward.

    Every BatchNorm becomes a `Site`, ``γ (z − E − d√V)/√(k V) + β`` with E and V computed from the weights and from the
    moments of the layer's input, d and k constants that calibration sets (0 and 1 before). A layer that nothing but a site
    reads runs with an effective weight and bias, recomputed from the parameters in every forward; its own ``weight`` stays
    the parameter, so that the data sees the plain network only. How moments flow is taken from a record of one forward.

    Args:
        model: any module with BatchNorms in it, torchvision's FrozenBatchNorm2d included; or a part of a network, with
            `in_place`. A copy of it is run on the meta device; one that has values in Python's hands is run on real tensors.
        input: moments of the input, `InputStats` or `Moments` (a sequence of them for several inputs); standard normal by
            default, as for standardised data.
        example: what the model's forward takes: a tensor, a tuple of arguments, or a dict of keyword arguments. Guessed by
            default. Nothing but sizes is taken from it, and these bind nothing unless a rule says so.
        method: "exact" follows γ and β through every activation; "paper" has the constants of Arpit et al. (2016), eqs 9, 11
            and 12.
        center: subtract each filter's mean, except for filters with one input channel, of which a centred one has no
            response to a constant; True warns if there are any. "auto" does so where nothing is preserved.
        preserve: keep the function of a trained network, from its running statistics. "auto" does if they have been
            trained. What comes out is compared with the original on random input.
        normalize: "all" also gives a site to every convolution and linear layer that has no normaliser, the output layers
            aside.
        rules: moment rules for this call, operation → function.
        leaf_modules: modules, classes or paths to keep whole: operations within them have no rules of their own.
        in_place: change the model itself instead of a copy, and return it: for a part of a network,
            ``normprop.convert(detector.backbone, in_place=True)``.

    Returns:
        The converted network, in the mode of the model. Paths and keys of weights, γ and β are the model's own; each site
        adds constant parameters.

    Raises:
        UnsupportedOpError: operations without a moment rule in front of some site, all of them named.
        TracingError: no input was found that the network runs on.
        NormPropError: nothing to convert, converted already, something that would still look at the batch, or contradicting
            options.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> normprop.convert(net)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
    """
    _check_options(model, method, center, preserve, normalize)
    keep = _is_trained(model) if preserve == "auto" else preserve
    _check_combination(method, center, keep)
    centring = (not keep and method == "exact") if center == "auto" else center
    if preserve is True:
        _check_statistics(model)
    root = independent_copy(model)
    walks = _walks(root, rules, leaf_modules, sample_shapes(input), example)
    plans = united({mode: plan_sites(walk, normalize, centring) for mode, walk in walks.items()})
    if not plans[False] and not plans[True]:
        _refuse_nothing(root)
    refuse_batch_statistics(walks, plans)
    for mode, walk in walks.items():
        _refuse_owned_weights(walk, plans[mode])
        walk.require(nodes_behind(walk, plans[mode], plans[mode]))
    if center is True:
        _warn_of_uncentred([*plans[False], *plans[True]])
    settings = _Settings(walks, plans, input, method, keep)
    prepare_native()
    agreement = Agreement(model, walks[False].example) if keep and not _looks_at_batch(model) else None
    converted = settings.install(root)
    if agreement is not None:
        agreement.check(converted)
    return settings.install(model) if in_place else converted


class _Settings:
    """Everything that has been decided about a conversion.

    Args:
        walks: of each mode.
        plans: of each mode.
        input: as the user gave it.
        method: as for `convert`.
        keep: whether the function is kept.
    """

    def __init__(
        self, walks: dict[bool, Walk], plans: dict[bool, list[SitePlan]], input: Any, method: str, keep: bool
    ) -> None:
        self.walks, self.plans, self.input, self.method, self.keep = walks, plans, input, method, keep

    def install(self, root: nn.Module) -> nn.Module:
        """Give a network its sites and its lane; it is changed itself, or a `Site` returned if it is a BatchNorm."""
        every = [*self.plans[False], *(p for p in self.plans[True] if p.key not in {q.key for q in self.plans[False]})]
        biases: dict[str, Any] = {
            p.path: root.get_submodule(p.layer.path).bias for p in every if p.layer is not None and p.bare
        }
        root, statistics = _install_sites(root, every)
        _freeze_biases(root, self.walks, self.plans)
        inputs = _install_inputs(root, self.walks[False], self.input)
        entries, layers, standards = self._entries(inputs)
        lane = Lane(root, entries, layers, self.walks[False].example, self.method)
        lane.standards = standards
        lane.filters = _filters(root, self.walks, self.plans)
        for entry in lane.all_entries():
            site: Any = root.get_submodule(entry.site)
            site.path, site.lane = entry.site, lane
        if self.method == "paper":
            start_as_printed_(root, self.walks[False], self.plans[False])
        if self.keep:
            preserve_(root, lane, statistics, biases)
        else:
            lane.initial = initial_values(root, lane.by_site)
        set_fingerprints_(root, lane)
        attach(root, lane)
        lane.prepare()
        for path, module in root.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(Unrecorded(path))
        return root

    def _entries(self, inputs: list[tuple[str, str] | None]) -> tuple[dict[bool, Any], dict[bool, Any], dict[bool, Any]]:
        """Entries of each mode; for each mode those of every layer's calls; and what layers' inputs are standardised by."""
        found: dict[tuple[str, int], Entry] = {}
        layers: dict[bool, dict[str, list[Entry | None]]] = {}
        standards: dict[bool, Any] = {False: {}, True: {}}
        for mode, walk in sorted(self.walks.items()):
            wanted = [p for p in self.plans[mode] if p.key not in found]
            given = inputs if len(inputs) == len(walk.record.inputs) else [None] * len(walk.record.inputs)
            if wanted or (self.method == "paper" and self.plans[mode]):
                passing = passing_noise(walk, self.walks[False])
                writer = LaneWriter(walk, self.plans[mode], wanted, given, self.method, passing)
                found |= {entry.key: entry for entry in writer.run()}
                standards[mode] = writer.standards()
            by_call = {(p.layer.path, p.layer_call): found[p.key] for p in self.plans[mode] if p.layer is not None}
            layers[mode] = {path: [] for path, _ in by_call}
            for node in walk.nodes:
                if node.op == "module" and node.target in layers[mode]:
                    calls = layers[mode][node.target]
                    calls.append(by_call.get((node.target, len(calls))))
        return {mode: [found[p.key] for p in of] for mode, of in self.plans.items()}, layers, standards


def _check_options(model: nn.Module, method: str, center: Any, preserve: Any, normalize: str) -> None:
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
        ("center", center, ("auto", True, False)),
        ("preserve", preserve, ("auto", True, False)),
        ("normalize", normalize, ("batchnorm", "all")),
    ):
        if value not in allowed:
            raise NormPropError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}.")


def _check_combination(method: str, center: Any, keep: bool) -> None:
    if keep and center is True:
        raise NormPropError("centring changes what a trained network computes.\nPass preserve=False, or center=False.")
    if method == "paper" and keep:
        raise NormPropError(
            "the paper's form has no constants that could keep a trained function.\n"
            "Pass preserve=False to start fresh, or method='exact'."
        )
    if method == "paper" and center is True:
        raise NormPropError("the paper does not centre its filters.\nPass method='exact' to centre them.")


def _warn_of_uncentred(plans: Sequence[SitePlan]) -> None:
    """Centring was asked for, and some filters would be left with no response to a constant, or none at all."""
    paths = dict.fromkeys(plan.layer.path for plan in plans if plan.layer is not None and not plan.center)
    if paths:
        named = ", ".join(list(paths)[:5]) + (", …" if len(paths) > 5 else "")
        message = f"filters with one input channel are not centred: {named}\ncenter='auto' says the same without a warning."
        warnings.warn(message, stacklevel=3)


def _check_statistics(root: nn.Module) -> None:
    for path, module in root.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is None:
            raise NormPropError(
                f"{path} keeps no running statistics: what it computes depends on the batch and cannot be kept.\n"
                "Pass preserve=False to start fresh."
            )


def _is_trained(root: nn.Module) -> bool:
    """Whether any BatchNorm's running statistics have left their initial values, or are frozen."""
    for module in root.modules():
        if isinstance(module, _NormBase) or _is_frozen(module):
            mean, var = module.running_mean, module.running_var
            if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.is_meta:
                continue
            if bool((mean != 0).any()) or bool((var != 1).any()):
                return True
    return False


def _looks_at_batch(model: nn.Module) -> bool:
    """Whether some BatchNorm has no running statistics: what it computes in evaluation can't be kept."""
    return any(isinstance(m, _NormBase) and m.running_mean is None and not _is_instance(m) for m in model.modules())


def _is_instance(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.instancenorm._InstanceNorm)


def _is_frozen(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm whose statistics are constants."""
    rule = TABLE.for_module(module)
    return rule is not None and rule.function is normalization.frozen_batch_norm


def _walks(root: nn.Module, rules: Any, leaf_modules: Sequence[Leaf], shape: Any, example: Any) -> dict[bool, Walk]:
    """The walk of each mode; that of evaluation twice where training wants more than inputs, as detectors do."""
    options = {"rules": rules, "leaf_modules": leaf_modules}
    evaluation = prepare(root, shape=shape, example=example, training=False, **options)
    try:
        training = prepare(root, example=evaluation.example, training=True, known=evaluation, **options)
        return {False: evaluation, True: training}
    except TracingError:
        if example is not None or shape is not None:
            return {False: evaluation, True: evaluation}
    try:  # what an auxiliary head takes, the rest takes too
        training = prepare(root, training=True, few=True, **options)
        evaluation = prepare(root, example=training.example, training=False, known=training, **options)
        return {False: evaluation, True: training}
    except TracingError:
        return {False: evaluation, True: evaluation}


def _refuse_nothing(root: nn.Module) -> None:
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


def _refuse_owned_weights(walk: Walk, plans: Sequence[SitePlan]) -> None:
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


def _install_sites(root: nn.Module, plans: Sequence[SitePlan]) -> tuple[nn.Module, dict[tuple[str, int], Statistics]]:
    """Put a `Site` at every planned path; returns what each call of a BatchNorm standardised by, by path and call.

    That is the running mean, less the layer's bias which the site takes away, and the running variance plus ε.
    """
    statistics: dict[tuple[str, int], Statistics] = {}
    like = reference_tensor(root)
    for path in dict.fromkeys(plan.path for plan in plans):
        own = [p for p in plans if p.path == path]
        calls, first = 1 + max(p.call for p in own), own[0]
        center = any(p.center for p in own)
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
            channels = old.running_mean.numel() if _is_frozen(old) else old.num_features
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
    room = weight[0].numel() - site.center
    count = min(DIRECTIONS, room - 1)
    if layer.transposed or count < 1:
        return
    shape: tuple[int, ...] = (layer.groups * count, *weight.shape[1:])
    shape = (len(site.shift), *shape) if site.shift.dim() == 2 else shape
    site.directions = nn.Parameter(site.scale.new_zeros(shape), requires_grad=False)


def _freeze_biases(root: nn.Module, walks: dict[bool, Walk], plans: dict[bool, list[SitePlan]]) -> None:
    """Freeze biases that would never see a gradient: every call of their layers is normalised, and nothing reads them."""
    read: set[str] = set()
    for mode, walk in walks.items():
        covered = {(p.layer.path, p.layer_call) for p in plans[mode] if p.layer is not None}
        calls: dict[str, int] = {}
        for node in walk.nodes:
            if node.op == "tensor":
                read.add(node.target)
            elif node.op == "module":
                call = calls.get(node.target, 0)
                calls[node.target] = call + 1
                if (node.target, call) not in covered:
                    read |= {f"{node.target}.{name}" for name, _ in walk.module(node).named_parameters()}
    names: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for plan in (p for of in plans.values() for p in of if p.layer is not None):
        assert plan.layer is not None
        bias = root.get_submodule(plan.layer.path).bias
        if bias is not None and not any(name in read for name in names[id(bias)]) and len(names[id(bias)]) == 1:
            bias.requires_grad_(False)


def _filters(root: nn.Module, walks: dict[bool, Walk], plans: dict[bool, list[SitePlan]]) -> list[dict[str, Any]]:
    """Weights that nothing but sites reads, so that dividing a filter by a number changes nothing.

    Returns:
        An entry per weight: its path, and ``channel_dim`` and ``groups`` as `filter_view` takes them.
    """
    read: set[int] = set()
    found: dict[int, dict[str, Any]] = {}
    for mode, walk in walks.items():
        covered = {(p.layer.path, p.layer_call): p for p in plans[mode] if p.layer is not None}
        for plan in covered.values():
            assert plan.layer is not None
            layout = {"channel_dim": int(plan.layer.transposed), "groups": plan.layer.groups}
            found.setdefault(id(root.get_submodule(plan.layer.path).weight), layout)
        calls: dict[str, int] = {}
        for node in walk.nodes:
            if node.op == "tensor":
                value = root.get_parameter(node.target) if node.target in dict(root.named_parameters()) else None
                read |= {id(value)}
            elif node.op == "module":
                call = calls.get(node.target, 0)
                calls[node.target] = call + 1
                if (node.target, call) not in covered:
                    read |= {id(p) for p in root.get_submodule(node.target).parameters()}
    own = {id(p): name for name, p in root.named_parameters()}
    return [{"weight": own[w], **layout} for w, layout in found.items() if w in own and w not in read]


def _site(channels: int, calls: int, like: Tensor, weight: Any, bias: Any, center: bool) -> Site:
    shape = (channels,) if calls == 1 else (calls, channels)
    return Site(weight, bias, like.new_zeros(shape), like.new_ones(shape), center=center)


def _install_inputs(root: nn.Module, walk: Walk, given: Any) -> list[tuple[str, str] | None]:
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
