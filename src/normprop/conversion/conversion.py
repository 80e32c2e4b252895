"""BatchNorm network in, NormProp network out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from normprop.conversion.batch import batched
from normprop.conversion.calibration import Statistics, preserve_
from normprop.conversion.converted import ConvertedModule
from normprop.conversion.paper_form import PaperRewriter, start_as_printed_
from normprop.conversion.rewrite import Rewriter
from normprop.conversion.site_plan import SitePlan, nodes_behind, plan_sites
from normprop.errors import NormPropError
from normprop.graph.copies import independent_copy, tracing_copy
from normprop.graph.input_moments import input_moments
from normprop.graph.trace import Leaf
from normprop.graph.walk import Walk, prepare, reference_tensor
from normprop.rules.table import Key, Rule
from normprop.sites.site import Site


def convert(
    model: nn.Module,
    input: Any = None,
    *,
    method: Literal["exact", "paper"] = "exact",
    center: Literal["auto"] | bool = "auto",
    preserve: Literal["auto"] | bool = "auto",
    normalize: Literal["batchnorm", "all"] = "batchnorm",
    rules: Mapping[Key, Rule | Callable[..., Any]] | None = None,
    leaf_modules: Sequence[Leaf] = (),
) -> ConvertedModule:
    """A copy of the network in which computed statistics take the place of batch statistics.

    Every BatchNorm becomes ``γ (z − E − d)/√(k V) + β`` with E and V computed from the weights and from the moments of the
    layer's input (METHOD §3). Where it follows a convolution or linear layer that nothing else reads, all of that is folded
    into an effective weight and bias, recomputed from the parameters in every forward, so that the data sees the plain
    network only.

    Args:
        model: a network that torch.fx can trace. It is not changed.
        input: moments of the input, `InputStats` or `Moments` (a sequence of them for several inputs); standard normal by
            default, as for standardised data.
        method: "exact" follows γ and β through every activation; "paper" is eqs 9 and 11 with constants.
        center: subtract each filter's mean, except for filters with one input channel, of which a centred one has no
            response to a constant; True warns if there are any. "auto" does so where nothing is preserved.
        preserve: keep the function of a trained network, from its running statistics. "auto" does if they have been
            trained.
        normalize: "all" also gives a site to every convolution and linear layer that has no normaliser, the output layers
            aside.
        rules: moment rules for this call, operation → function.
        leaf_modules: modules, classes or paths that tracing must not enter.

    Returns:
        The converted network, in the mode of the model. Paths and keys of weights, γ and β are the model's own; each site
        adds ``shift`` (d) and ``scale`` (k), constant parameters.

    Raises:
        UnsupportedOpError: operations without a moment rule in front of some site, all of them named.
        TracingError: control flow on values.
        NormPropError: nothing to convert, converted already, or contradicting options.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> normprop.convert(net)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
    """
    _check_options(model, method, center, preserve, normalize)
    root = independent_copy(model)
    keep = _is_trained(root) if preserve == "auto" else preserve
    _check_combination(method, center, keep)
    centring = (not keep and method == "exact") if center == "auto" else center
    if preserve is True:
        _check_statistics(root)
    walks = _walks(root, rules, leaf_modules, _sample_shape(input))
    plans = {mode: plan_sites(walk, normalize, centring) for mode, walk in walks.items()}
    if not plans[False]:
        raise NormPropError("the network has no BatchNorm to convert.\nnormalize='all' gives every layer a site.")
    for mode, walk in walks.items():
        walk.require(nodes_behind(walk, plans[mode]))
    if center is True:
        _warn_of_uncentred([*plans[False], *plans[True]])
    statistics = _install_sites(root, [*plans[False], *plans[True]])
    _install_constants(root, walks)
    for mode, walk in walks.items():
        _freeze_biases(walk, plans[mode])
    inputs = _install_inputs(root, walks[False], input)
    rewriter = PaperRewriter if method == "paper" else Rewriter
    graphs = {mode: rewriter(walks[mode], plans[mode], inputs).run() for mode in (True, False)}
    if walks[True] is walks[False]:
        graphs[True] = graphs[False]
    if method == "paper":
        start_as_printed_(root, walks[False], plans[False])
    if keep:
        bare = {plan.path: plan.layer.module.bias for plan in plans[False] if plan.layer is not None and plan.merged is None}
        preserve_(root, graphs.values(), statistics, bare)
    together = {graph: batched(graph, root) for graph in dict.fromkeys(graphs.values())}
    meta = {
        "inputs": walks[False].inputs(),
        "calibrates": method == "exact",
        "filters": _filters(root, walks, plans),
    }
    return ConvertedModule.assemble(
        root, {mode: together[graph] for mode, graph in graphs.items()}, type(model).__name__, meta
    )


def _check_options(model: nn.Module, method: str, center: Any, preserve: Any, normalize: str) -> None:
    if not isinstance(model, nn.Module):
        raise NormPropError(f"convert takes a torch.nn.Module, not a {type(model).__name__}.")
    if isinstance(model, ConvertedModule) or any(isinstance(m, Site) for m in model.modules()):
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
    """Whether any BatchNorm's running statistics have left their initial values."""
    for module in root.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
            mean, var = module.running_mean, module.running_var
            if mean.device.type != "meta" and (bool((mean != 0).any()) or bool((var != 1).any())):
                return True
    return False


def _sample_shape(given: Any) -> tuple[int, ...] | None:
    first = given[0] if isinstance(given, tuple | list) and given else given
    shape = getattr(first, "shape", None)
    return tuple(shape) if shape else None


def _walks(root: nn.Module, rules: Any, leaf_modules: Sequence[Leaf], shape: Any) -> dict[bool, Walk]:
    """The walk of each mode; one and the same if both modes run the same operations."""
    walks = {True: prepare(tracing_copy(root).train(), rules=rules, leaf_modules=leaf_modules, shape=shape)}
    shape = shape or walks[True].inputs()[0][0]  # what an auxiliary head takes, the rest takes too
    walks[False] = prepare(tracing_copy(root).eval(), rules=rules, leaf_modules=leaf_modules, shape=shape)
    if _signature(walks[True].graph_module.graph) == _signature(walks[False].graph_module.graph):
        walks[True] = walks[False]
    return walks


def _signature(graph: fx.Graph) -> list[Any]:
    name = lambda node: node.name
    return [
        (n.op, n.target, repr(fx.node.map_arg(n.args, name)), repr(fx.node.map_arg(n.kwargs, name))) for n in graph.nodes
    ]


def _install_sites(root: nn.Module, plans: Sequence[SitePlan]) -> dict[tuple[str, int], Statistics]:
    """Put a `Site` at every planned path; returns what each call of a BatchNorm standardised by, by path and call.

    That is the running mean, less the layer's bias which the site takes away, and the running variance plus ε.
    """
    statistics: dict[tuple[str, int], Statistics] = {}
    for path in dict.fromkeys(plan.path for plan in plans):
        plan = next(p for p in plans if p.path == path)
        calls = 1 + max(p.call for p in plans if p.path == path)
        parent_path, _, name = path.rpartition(".")
        parent = root.get_submodule(parent_path)
        old = getattr(parent, name, None)
        if isinstance(old, _NormBase):
            for call in [p for p in plans if p.path == path]:
                if old.running_mean is not None and old.running_var is not None:
                    bias = None if call.layer is None else call.layer.module.bias
                    mean = old.running_mean if bias is None else old.running_mean - bias.detach()
                    statistics[path, call.call] = (mean, old.running_var + old.eps)
            site = _site(old.num_features, calls, reference_tensor(root), old.weight, old.bias)
            for key, child in old.named_children():  # the activation of a norm-act module
                site.add_module(key, child)
            site.train(old.training)
        else:
            assert plan.layer is not None
            like = plan.layer.module.weight
            ones, zeros = like.new_ones(plan.layer.channels), like.new_zeros(plan.layer.channels)
            site = _site(plan.layer.channels, calls, reference_tensor(root), nn.Parameter(ones), nn.Parameter(zeros))
            site.train(root.training)
        setattr(parent, name, site)
    return statistics


def _install_constants(root: nn.Module, walks: dict[bool, Walk]) -> None:
    """Give the network the tensors that its forward makes of literals, which tracing leaves on its own copy."""
    for mode, walk in walks.items():
        for node in walk.graph_module.graph.nodes:
            name = str(node.target)
            if node.op != "get_attr" or "." in name or not name.startswith("_tensor_constant"):
                continue
            own = f"{name}_training" if mode and walks[True] is not walks[False] else name
            if not hasattr(root, own):
                root.register_buffer(own, getattr(walk.graph_module, name).clone(), persistent=False)
            node.target = own


def _freeze_biases(walk: Walk, plans: Sequence[SitePlan]) -> None:
    """A bias that every call of its layer normalises away would never see a gradient."""
    rewritten = {plan.node if plan.merged is None else plan.merged for plan in plans if plan.layer is not None}
    plain = {str(n.target) for n in walk.graph_module.graph.nodes if n.op == "call_module" and n not in rewritten}
    for plan in plans:
        if plan.layer is not None and plan.layer.path not in plain and plan.layer.module.bias is not None:
            plan.layer.module.bias.requires_grad_(False)


def _filters(root: nn.Module, walks: dict[bool, Walk], plans: dict[bool, list[SitePlan]]) -> list[dict[str, Any]]:
    """Weights that nothing but sites reads, so that dividing a filter by a number changes nothing.

    Returns:
        An entry a weight: its path, and ``channel_dim`` and ``groups`` as `filter_view` takes them.
    """
    read: set[int] = set()
    found: dict[int, dict[str, Any]] = {}
    for mode, walk in walks.items():
        sites = {plan.node if plan.merged is None else plan.merged: plan for plan in plans[mode] if plan.layer is not None}
        for plan in sites.values():
            assert plan.layer is not None
            layout = {"channel_dim": int(plan.layer.transposed), "groups": plan.layer.groups}
            found.setdefault(id(plan.layer.module.weight), layout)
        for node in walk.graph_module.graph.nodes:
            if node.op in ("call_module", "get_attr") and node not in sites:
                value = attrgetter(str(node.target))(walk.graph_module)
                read |= {id(p) for p in (value.parameters() if isinstance(value, nn.Module) else [value])}
    own = {id(p): name for name, p in root.named_parameters()}
    return [{"weight": own[w], **layout} for w, layout in found.items() if w in own and w not in read]


def _site(channels: int, calls: int, like: Tensor, weight: Any, bias: Any) -> Site:
    shape = (channels,) if calls == 1 else (calls, channels)
    return Site(weight, bias, like.new_zeros(shape), like.new_ones(shape))


def _install_inputs(root: nn.Module, walk: Walk, given: Any) -> list[tuple[str, str] | None]:
    """Keep input moments that are not standard normal as constant parameters of the network."""
    found = input_moments(walk.shapes(), given, reference_tensor(root))
    if given is None:
        return [None] * len(found)
    paths: list[tuple[str, str] | None] = []
    for i, moments in enumerate(found):
        if bool((moments.mean == 0).all()) and bool((moments.var == 1).all()):
            paths.append(None)
            continue
        name = f"input_moments_{i}" if len(found) > 1 else "input_moments"
        holder = nn.Module()
        holder.mean = nn.Parameter(moments.mean.contiguous(), requires_grad=False)
        holder.var = nn.Parameter(moments.var.contiguous(), requires_grad=False)
        root.add_module(name, holder)
        paths.append((f"{name}.mean", f"{name}.var"))
    return paths
