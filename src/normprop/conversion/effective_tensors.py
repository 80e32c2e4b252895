"""The effective tensors of a converted network as parameters of plain layers, and the way back through the moment lane."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normprop.conversion.attachment import detach
from normprop.conversion.entry import Entry
from normprop.conversion.lane import Lane, lane_of
from normprop.conversion.placement import is_attached
from normprop.errors import NormPropError
from normprop.graph.copies import put_module, sharing_copy
from normprop.sites.site import Site

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
_REMEDY = "Use normprop.integrations.opacus.WholeNetwork, which takes the gradients of the network as it is."


class ChannelAffine(nn.Module):
    """``factor · x + offset`` per channel along dimension 1: a site that no layer stands before.

    Attributes:
        weight: factor, ``(C,)``.
        bias: offset, ``(C,)``.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add."""
        shape = (-1, *(1,) * (x.dim() - 2))
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))


class Writable(nn.Module):
    """A copy of its input, which may be written to: ``out += skip`` may not touch what a layer with hooks returned."""

    def forward(self, x: Tensor) -> Tensor:
        """Copy."""
        return x.clone()


class _Part(NamedTuple):
    """A converted part of the model.

    Attributes:
        lane: its lane.
        root: the part.
        entries: what the lane computes for it in training.
        leaves: for each entry the two parameters that hold what it computed.
    """

    lane: Lane
    root: nn.Module
    entries: list[Entry]
    leaves: list[tuple[nn.Parameter, nn.Parameter]]


class EffectiveTensors:
    """Effective weights and biases as leaves: a plain network reads them, and their gradients go back through the lane.

    With θ the model's parameters and η = E(θ) what its lane computes, `plain` is the model's function of η and of the
    parameters that layers read as they are. `refresh` writes η; `send_back` takes a gradient with respect to η to one with
    respect to θ, ``Jᵀ g`` with J = ∂E/∂θ at the θ of the last refresh.

    Args:
        model: a converted network, or a module that holds some.

    Attributes:
        plain: of the model's class, in its mode. Layers with a site have effective tensors as parameters; all other
            parameters are the model's own, and buffers too. Modules that work in place do so no more.

    Raises:
        NormPropError: nothing in the model is converted; a layer with a site is called several times; the conversion has the
            paper's form; or something stands between a layer and its site.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = [(path, module, lane) for path, module in model.named_modules() if (lane := lane_of(module)) is not None]
        if not parts:
            raise NormPropError(f"{type(model).__name__} holds no converted network.\nConvert it first.")
        self.plain = sharing_copy(model)
        self.parts: list[_Part] = []
        for path, root, lane in parts:
            entries = _entries(root, lane)
            trained = [_is_trained(lane, root, entry) for entry in entries]
            leaves = self._install(path, entries, _values(lane, root, entries), trained)
            self.parts.append(_Part(lane, root, entries, leaves))
        detach(self.plain)
        for module in self.plain.modules():
            if getattr(module, "inplace", False) is True:
                module.__dict__["inplace"] = False  # what hooks look at must stay
        self.leaves = [leaf for part in self.parts for pair in part.leaves for leaf in pair]
        self.model, self.trained = model, [p.requires_grad for p in model.parameters()]
        self.sources: list[Tensor] = []
        self.versions: list[int] = []
        self.settle()
        self.first = [leaf.detach().clone() for leaf in self.leaves]  # until the first forward

    def _install(
        self, path: str, entries: Sequence[Entry], values: Sequence[tuple[Tensor, Tensor]], trained: Sequence[bool]
    ) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Give the plain copy of one part its leaves."""
        copied = self.plain.get_submodule(path)
        leaves: list[tuple[nn.Parameter, nn.Parameter]] = []
        for entry, (weight, bias), requires_grad in zip(entries, values, trained, strict=True):
            pair = _leaf(weight, requires_grad), _leaf(bias, requires_grad)
            leaves.append(pair)
            layer = ChannelAffine(*pair) if entry.layer is None else copied.get_submodule(entry.layer)
            layer.weight, layer.bias = pair
            place = [layer, Writable()] if entry.layer is None else [Writable()]
            if not entry.bare:
                site = copied.get_submodule(entry.site)
                stands = _standing(site, [*place, *site.children()])
                self.plain = put_module(self.plain, ".".join(filter(None, (path, entry.site))), stands)
                copied = self.plain.get_submodule(path)
            else:
                layer._modules.pop("site", None)
        return leaves

    def __getstate__(self) -> dict[str, Any]:
        """All but what the last forward has left."""
        return vars(self) | {"sources": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.settle()

    def settle(self) -> None:
        """Take the leaves as they are: what changed them was right to."""
        self.versions = [leaf._version for leaf in self.leaves]
        self.first = []

    def refresh(self) -> None:
        """Compute effective tensors from the model's present parameters, and write them into the leaves.

        Raises:
            NormPropError: the leaves were changed by something else, also by a broadcast before the first forward; or
                parameters were frozen or unfrozen since.
        """
        if self.versions != [leaf._version for leaf in self.leaves]:
            raise NormPropError(
                "something else has changed effective tensors, which are computed from the model's parameters.\n"
                "Give the optimizer model.parameters(), and pass private.optimizer(optimizer) on."
            )
        if any(not torch.equal(leaf, first) for leaf, first in zip(self.leaves, self.first, strict=False)):
            raise NormPropError(
                "effective tensors were written to from outside, as DifferentiallyPrivateDistributedDataParallel does with "
                "those of process 0.\nStart all processes from the same parameters: for t in model.state_dict().values(): "
                "torch.distributed.broadcast(t, 0)."
            )
        sources = [t for part in self.parts for pair in _values(part.lane, part.root, part.entries) for t in pair]
        if torch.is_grad_enabled():
            if self.trained != [p.requires_grad for p in self.model.parameters()]:
                raise NormPropError(
                    "parameters were frozen or unfrozen since the effective tensors were made.\nMake them anew afterwards."
                )
            self.sources = sources
        with torch.no_grad():
            for leaf, source in zip(self.leaves, sources, strict=True):
                if not torch.equal(leaf, source):
                    leaf.copy_(source)
        self.settle()

    def send_back(self) -> None:
        """Take the leaves' gradients through the lane: ``.grad`` of parameters that the lane reads gains ``Jᵀ g``.

        Raises:
            NormPropError: the network has not run since the last time.
        """
        if not self.sources:
            raise NormPropError("no forward has run since the last step.\nRun one, with gradients, before optimizer.step().")
        pairs = [(s, leaf.grad) for s, leaf in zip(self.sources, self.leaves, strict=True) if leaf.grad is not None]
        self.sources = []
        if pairs:
            torch.autograd.backward([source for source, _ in pairs], [gradient for _, gradient in pairs])


def _leaf(value: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=requires_grad)


@torch.enable_grad()
def _is_trained(lane: Lane, root: nn.Module, entry: Entry) -> bool:
    """Whether what the lane computes for one entry depends on what is trainable; compiled segments don't say for each."""
    (scale,) = lane.program([entry]).function(root)
    return any(t is not None and t.requires_grad for t in scale)


def _values(lane: Lane, root: nn.Module, entries: Sequence[Entry]) -> list[tuple[Tensor, Tensor]]:
    """What the lane computes: weight and bias of a layer, or factor and offset, with the parameters' dtype."""
    found, values = lane.evaluate(root, entries), []
    for entry in entries:
        scale = found[entry.key]
        first = scale.weight if entry.layer is not None else scale.factor
        assert first is not None
        kind = _kind(root, entry)
        values.append((first.to(kind), scale.offset.to(kind)))
    return values


def _kind(root: nn.Module, entry: Entry) -> torch.dtype:
    holder: Any = root.get_submodule(entry.site if entry.layer is None else entry.layer)
    kind: torch.dtype = (holder.shift if entry.layer is None else holder.weight).dtype
    return kind


def _entries(root: nn.Module, lane: Lane) -> list[Entry]:
    """All entries of a lane that plain layers can hold.

    Raises:
        NormPropError: some can't be held.
    """
    if lane.method == "paper":
        raise NormPropError(f"layers of the paper's form standardise their inputs.\n{_REMEDY}")
    entries = lane.all_entries()
    for mode in (False, True):
        for path, calls in lane.layers[mode].items():
            if len(calls) > 1:
                raise NormPropError(
                    f"{path} is called {len(calls)} times, each with an effective weight of its own.\n{_REMEDY}"
                )
    for entry in entries:
        if len(lane.by_site[entry.site]) > 1:
            raise NormPropError(f"{entry.site} is called several times, each with other moments.\n{_REMEDY}")
        if not is_attached(root, entry):
            raise NormPropError(
                f"a hook, wrapper or parametrisation stands between {entry.layer} and {entry.site}.\n{_REMEDY}"
            )
    return entries


def _standing(site: nn.Module, inside: Sequence[nn.Module]) -> nn.Module:
    """What stands in a site's place: what is left of it, with the user's hooks."""
    assert isinstance(site, Site)
    stands = nn.Sequential(*inside)
    for name in _HOOKS:
        stands.__dict__[name] = copy.copy(site.__dict__[name])
    return stands.train(site.training)
