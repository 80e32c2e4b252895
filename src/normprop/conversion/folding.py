"""NormProp network in, plain torch network out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from normprop.conversion.agreement import Agreement
from normprop.conversion.attachment import Cover, detach
from normprop.conversion.entry import Key
from normprop.conversion.lane import Lane, lane_of, lanes_in
from normprop.conversion.placement import is_attached
from normprop.errors import NormPropError
from normprop.graph.copies import independent_copy, put_module
from normprop.sites.reference import Scale


def fold(model: nn.Module, *, check: bool = True) -> nn.Module:
    """The same function in plain PyTorch: the moment lane is evaluated once and its result becomes ordinary parameters.

    The network keeps its class. A layer with a site gets the effective weight and bias as its own, the site becomes an
    `nn.Identity`; a site without a layer becomes a multiplication and an addition. The layers of `normprop.nn` become their
    `folded` form.

    Args:
        model: a network that `convert` made, any module that holds some, or layers of `normprop.nn`. It is not changed.
        check: compare both on random input, in eval mode.

    Returns:
        A network without a module, parameter or operation of normprop, in the mode of the model.

    Raises:
        NormPropError: nothing to fold; a layer that is called several times with different effective weights, which no plain
            layer can hold; or the check failed.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> normprop.fold(normprop.convert(net))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    if not lanes_in(model):
        return _fold_layers(model)
    folded = independent_copy(model)
    for path, module in list(folded.named_modules()):
        lane = lane_of(module)
        if lane is not None:
            folded = put_module(folded, path, _fold_network(module, lane))
    detach(folded)
    lane = lane_of(model)
    if check and lane is not None:
        Agreement(model, lane.example).check(folded, "folded")
    return folded


@torch.no_grad()
def _fold_network(root: nn.Module, lane: Lane) -> nn.Module:
    entries = [e for e in lane.all_entries() if is_attached(root, e)]
    values = lane.evaluate(root, entries)
    by_site: dict[str, list[Scale]] = {}
    covered: dict[str, Any] = {}
    for module in root.modules():
        covers = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Cover))
        covered |= {hook.path: module for hook in covers if hook.lane is lane}
    apart_sites = _apart_sites(lane, values, list(covered))
    for path, layer in covered.items():
        own = [entry for entry in lane.all_entries() if entry.layer == path]
        plain = _is_read_plain(lane, path)
        scales = [values[entry.key] for entry in own if entry.key in values]
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
        kind = layer.weight.dtype
        if not any(entry.site in apart_sites for entry in own):
            assert scales[0].weight is not None
            layer.weight = nn.Parameter(scales[0].weight.to(kind).clone())
            layer.bias = nn.Parameter(scales[0].offset.to(kind).clone())
        else:  # it is read as it is, too: what sites do is done where they were
            apart = [lane.parts(root, entry, layer) for entry in own]
            if plain and any(root.get_submodule(entry.site).center for entry in own):
                raise _several(path)
            for entry, (_, factor, offset) in zip(own, apart, strict=True):
                offset = offset if layer.bias is None else offset - factor * layer.bias
                by_site.setdefault(entry.site, []).append(Scale(None, factor, offset))
            layer.weight = nn.Parameter(apart[0][0].clone())
        layer._modules.pop("site", None)
    for entry in lane.all_entries():
        if entry.layer is None:
            by_site.setdefault(entry.site, []).append(values[entry.key])
    for path, calls in {**lane.standards[True], **lane.standards[False]}.items():
        reader: Any = root.get_submodule(path)
        found = [lane.standard(root, path, call, node) for call, node in enumerate(calls) if node is not None]
        if len(found) != len(calls) or any(
            not torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True)
        ):
            raise NormPropError(f"{path} is called {len(calls)} times with inputs that are standardised differently.")
        mean, inverse = (t.expand(torch.broadcast_shapes(*(u.shape for u in found[0]))) for t in found[0])
        kind = reader.weight.dtype
        first = _elementwise(inverse.to(kind), (-mean * inverse).to(kind))
        root = put_module(root, path, nn.Sequential(first, reader).train(reader.training))
    for path in dict.fromkeys(entry.site for entry in lane.all_entries() if not entry.bare):
        site = root.get_submodule(path)
        place: nn.Module = nn.Identity()
        if path in by_site:
            scale = by_site[path][0]
            if not _are_same(by_site[path]):
                raise _several(path)
            assert scale.factor is not None
            ranks = {entry.rank for entry in lane.all_entries() if entry.site == path}
            kind = next((p.dtype for p in (site.weight, site.bias) if isinstance(p, Tensor)), scale.factor.dtype)
            place = _affine(scale.factor.to(kind), scale.offset.to(kind), ranks)
        inner = list(site.named_children())
        if inner:
            place = (
                nn.Sequential(place, *(module for _, module in inner))
                if path in by_site
                else nn.Sequential(*(m for _, m in inner))
            )
        root = put_module(root, path, place.train(site.training))
    for name in [name for name in root._parameters if name.startswith("input_moments")]:
        del root._parameters[name]
    return root


def _is_read_plain(lane: Lane, path: str) -> bool:
    """Whether some call of a layer is no site's."""
    return any(entry is None for of in lane.layers.values() for entry in of.get(path, ()))


def _apart_sites(lane: Lane, values: Mapping[Key, Scale], layers: Sequence[str]) -> set[str]:
    """Sites whose work can't go into the layers before them: it would be done twice, or to what is read plain, too."""
    found = {entry.site for entry in lane.all_entries() if entry.layer is None}
    for path in layers:
        own = [entry for entry in lane.all_entries() if entry.layer == path]
        scales = [values[entry.key] for entry in own if entry.key in values]
        if len(scales) < len(own) or _is_read_plain(lane, path) or not _are_same(scales):
            found |= {entry.site for entry in own}
    while True:
        before = len(found)
        for path in layers:
            own = [entry for entry in lane.all_entries() if entry.layer == path]
            if any(entry.site in found for entry in own):
                found |= {entry.site for entry in own}
        if len(found) == before:
            return found


def _are_same(scales: list[Scale]) -> bool:
    """Whether all calls have one scale."""
    alike: Any = lambda a, b: (a is None and b is None) or torch.allclose(a, b, rtol=1e-6, atol=1e-12)
    return all(alike(a, b) for other in scales[1:] for a, b in zip(scales[0], other, strict=True))


def _several(path: str) -> NormPropError:
    return NormPropError(
        f"{path} is called several times with different effective weights: no plain layer can hold them.\n"
        "Keep the converted network for inference, or give each call a layer of its own before converting."
    )


def _affine(factor: Tensor, offset: Tensor, ranks: set[int]) -> nn.Module:
    """A module of torch that multiplies and adds per channel along dimension 1."""
    (rank,) = ranks if len(ranks) == 1 else {2}
    shape = (-1, *(1,) * (rank - 2))
    return _elementwise(factor.reshape(shape), offset.reshape(shape))


def _elementwise(factor: Tensor, offset: Tensor) -> nn.Module:
    """A module of torch that multiplies and adds."""
    root, graph = nn.Module(), fx.Graph()
    root.weight, root.bias = (nn.Parameter(t.clone()) for t in (factor, offset))
    x, weight, bias = graph.placeholder("x"), graph.get_attr("weight"), graph.get_attr("bias")
    graph.output(graph.call_function(torch.addcmul, (bias, x, weight)))
    return fx.GraphModule(root, graph, "Affine")


def _fold_layers(model: nn.Module) -> nn.Module:
    """Replace every module that can fold itself."""
    layers: dict[str, Any] = {path: m for path, m in model.named_modules() if hasattr(m, "folded")}
    if "" in layers:
        plain: nn.Module = layers[""].folded()
        return plain
    result = copy.deepcopy(model)
    if not layers:
        raise NormPropError(
            f"{type(model).__name__} holds nothing to fold.\nfold takes a converted network or normprop.nn layers."
        )
    for path, layer in layers.items():
        if any(path.startswith(f"{outer}.") for outer in layers):
            continue  # the activation inside a layer: the layer folds it
        result = put_module(result, path, layer.folded())
    return result
