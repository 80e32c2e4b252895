"""BatchNorm network in, NormProp network out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from normprop.conversion.agreement import Agreement
from normprop.conversion.attachment import Unrecorded, attach
from normprop.conversion.batch_norms import is_trained, looks_at_batch
from normprop.conversion.entry import Entry
from normprop.conversion.fingerprint import set_fingerprints_
from normprop.conversion.initial_values import initial_values
from normprop.conversion.lane import Lane
from normprop.conversion.lane_writer import LaneWriter, passing_noise
from normprop.conversion.paper_form import start_as_printed_
from normprop.conversion.preserved_statistics import preserve_
from normprop.conversion.refusals import (
    check_combination,
    check_options,
    check_statistics,
    refuse_computed_gains,
    refuse_nothing,
    refuse_owned_weights,
    warn_of_uncentred,
)
from normprop.conversion.site_installation import install_inputs, install_sites
from normprop.conversion.site_parameters import filters_of_sites, freeze_biases
from normprop.conversion.site_plan import SitePlan, nodes_behind, plan_sites, refuse_batch_statistics, united
from normprop.errors import TracingError
from normprop.graph.copies import independent_copy
from normprop.graph.input_moments import sample_shapes
from normprop.graph.preparation import prepare
from normprop.graph.recorder import Leaf
from normprop.graph.walk import Walk
from normprop.native.operands import prepare as prepare_native
from normprop.rules.table import Key, Rule


def convert(
    model: nn.Module,
    input: Any = None,
    *,
    example: Any = None,
    method: Literal["exact", "paper"] = "exact",
    center: Literal["auto"] | float = "auto",
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
        center: how much of each filter's mean to subtract, True or 1 for all of it, False or 0 for nothing, rounded to a
            256th; filters with one input channel keep theirs, as a centred one has no response to a constant, and True warns
            if there are any. "auto" is True where nothing is preserved.
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
    check_options(model, method, center, preserve, normalize)
    keep = is_trained(model) if preserve == "auto" else preserve
    check_combination(method, center, keep)
    centring = (not keep and method == "exact") if center == "auto" else center
    if preserve is True:
        check_statistics(model)
    root = independent_copy(model)
    walks = _walks(root, rules, leaf_modules, sample_shapes(input), example)
    plans = united({mode: plan_sites(walk, normalize, centring) for mode, walk in walks.items()})
    if not plans[False] and not plans[True]:
        refuse_nothing(root)
    refuse_batch_statistics(walks, plans)
    refuse_computed_gains(root, (plan.path for of in plans.values() for plan in of))
    for mode, walk in walks.items():
        refuse_owned_weights(walk, plans[mode])
        walk.require(nodes_behind(walk, plans[mode], plans[mode]))
    if center is True:
        warn_of_uncentred([*plans[False], *plans[True]])
    settings = _Settings(walks, plans, input, method, keep, center_open=center == "auto")
    prepare_native()
    agreement = Agreement(model, walks[False].example) if keep and not looks_at_batch(model) else None
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
        center_open: whether nobody said how far to centre.
    """

    def __init__(
        self,
        walks: dict[bool, Walk],
        plans: dict[bool, list[SitePlan]],
        input: Any,
        method: str,
        keep: bool,
        *,
        center_open: bool,
    ) -> None:
        self.walks, self.plans, self.input, self.method, self.keep = walks, plans, input, method, keep
        self.center_open = center_open

    def install(self, root: nn.Module) -> nn.Module:
        """Give a network its sites and its lane; it is changed itself, or a `Site` returned if it is a BatchNorm."""
        every = [*self.plans[False], *(p for p in self.plans[True] if p.key not in {q.key for q in self.plans[False]})]
        biases: dict[str, Any] = {
            p.path: root.get_submodule(p.layer.path).bias for p in every if p.layer is not None and p.bare
        }
        root, statistics = install_sites(root, every)
        freeze_biases(root, self.walks, self.plans)
        inputs = install_inputs(root, self.walks[False], self.input)
        entries, layers, standards = self._entries(inputs)
        lane = Lane(root, entries, layers, self.walks[False].example, self.method)
        lane.standards, lane.center_open = standards, self.center_open
        lane.filters = filters_of_sites(root, self.walks, self.plans)
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
