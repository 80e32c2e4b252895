"""A converted network whose effective tensors Opacus clips and noises by its own hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from torch import Tensor, nn

from normprop.conversion.effective_tensors import ChannelAffine, EffectiveTensors
from normprop.errors import NormPropError
from normprop.integrations.opacus.lane_optimizer import LaneOptimizer

_OWN = "effective_tensors"


class _PaddedConv1d(nn.Conv1d):
    """One with a padding mode: Opacus' rule for `nn.Conv1d` pads with zeros, its rule for any other class is right."""


class _PaddedConv2d(nn.Conv2d):
    """See `_PaddedConv1d`."""


class _PaddedConv3d(nn.Conv3d):
    """See `_PaddedConv1d`."""


_PADDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: _PaddedConv1d,
    nn.Conv2d: _PaddedConv2d,
    nn.Conv3d: _PaddedConv3d,
}


class PrivateNetwork(nn.Module):
    """A network for `PrivacyEngine` at the cost of plain layers: its parameters are what the layers run with.

    Opacus takes the gradients of each sample by hooks on layers. Here a layer with a site holds its effective weight and
    bias as parameters, so that hooks find a plain convolution: η = E(θ), with E the moment lane and θ the model's
    parameters. DP-SGD clips the gradient of each sample with respect to η and to the parameters that no site touches, adds
    them up and adds noise: g̃. `optimizer` takes g̃ back through the lane once a step, ``(∂E/∂θ)ᵀ g̃``, and steps on θ.

    **Privacy.** All that a step releases of the data is g̃. It is a sum of vectors no longer than ``max_grad_norm`` with
    Gaussian noise on it, so that Opacus' accounting holds as for any network with parameters η (Abadi et al. 2016, arXiv
    1607.00133, Algorithm 1). E looks at no data, and its Jacobian depends on θ alone, which follows from earlier releases:
    the next θ is a function of releases, and post-processing spends nothing (Dwork and Roth 2014, Proposition 2.1). The
    model's constants must not come from private data: running statistics of the private training set, `normprop.calibrate`
    and `normprop.keep_calibrated` on it are outside of the accounting.

    **What is clipped** is another vector than with `WholeNetwork`, which clips each sample's gradient with respect to θ.
    That one is (∂E/∂θ)ᵀ times this one: a filter's part is multiplied by γ/√(kV), loses its mean where filters are centred,
    and gains what the filter does to the moments of later layers. So a clipping norm chosen for one need not suit the other,
    and the one may shorten samples that the other leaves as they are. With nothing clipped and no noise both give the
    same gradient. Noise is equally strong in all directions of η, not of θ.

    Opacus runs the network once forward and once back, so that dropout, which `WholeNetwork` refuses, works. In evaluation
    mode the network itself runs. ``state_dict`` is the model's.

    Args:
        network: what `normprop.convert` made, or a module that holds such parts. Its parameters are trained.

    Attributes:
        tensors: the effective tensors.

    Raises:
        NormPropError: nothing in it is trainable, or converted; layers with a site that are called several times, hooks or
            parametrisations between a layer and its site, ``method="paper"``: `WholeNetwork` takes these.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = normprop.convert(net)
        >>> private = PrivateNetwork(model)
        >>> optimizer = private.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
        >>> [tuple(p.shape) for p in private.parameters()]
        [(8, 4), (8,), (2, 8), (2,)]
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not any(p.requires_grad for p in network.parameters()):
            raise NormPropError("the network has no trainable parameter.\nUnfreeze those that are to be trained.")
        self.tensors = EffectiveTensors(network)
        self._network = [network]  # in a list: hooks belong to the plain layers
        for module in self.tensors.plain.modules():
            if type(module) in _PADDED and module.padding_mode != "zeros":
                module.__class__ = _PADDED[type(module)]
        self.add_module(_OWN, self.tensors.plain)
        self.training = network.training
        self._plain_prefix = f"{_OWN}."
        self.register_load_state_dict_post_hook(_forget_plain_keys)  # type: ignore[no-untyped-call]  # torch has no types

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        return self._network[0]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The network's output.

        Raises:
            NormPropError: see `EffectiveTensors.refresh`.
        """
        if not self.training:
            return self.network(*inputs, **named)
        self.tensors.refresh()
        return self.tensors.plain(*inputs, **named)

    def optimizer(self, optimizer: torch.optim.Optimizer) -> LaneOptimizer:
        """What to give `PrivacyEngine` for an optimizer of the network's parameters.

        Args:
            optimizer: over ``network.parameters()`` or some of them, in any groups.

        Raises:
            NormPropError: it holds other tensors, or is wrapped already.
        """
        return LaneOptimizer(optimizer, self.network, self.tensors)

    def train(self, mode: bool = True) -> PrivateNetwork:
        """Set the network's mode."""
        super().train(mode)
        self.network.train(mode)
        return self

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The network's."""
        return self.network.state_dict(*args, **options)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load the network's."""
        *_, missing, unexpected, errors = args
        self._plain_prefix = f"{prefix}{_OWN}."
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            found = self.network.load_state_dict(own, strict=False)
        except RuntimeError as error:
            errors.append(str(error))
            return
        missing += [prefix + key for key in found.missing_keys]
        unexpected += [prefix + key for key in found.unexpected_keys]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrivateNetwork:
        """Move the network along."""
        self.network._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types for it
        self.tensors.settle()
        return self


def _forget_plain_keys(module: PrivateNetwork, incompatible: Any) -> None:
    """Effective tensors are no part of a state_dict."""
    keys = incompatible.missing_keys
    keys[:] = [key for key in keys if not key.startswith(module._plain_prefix)]


@register_grad_sampler(ChannelAffine)  # type: ignore[untyped-decorator]  # opacus has no types
def sample_gradients(layer: ChannelAffine, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Gradients of each sample's factor and offset, ``(N, C)``."""
    found = {
        layer.weight: torch.einsum("nc...->nc", activations[0] * backprops),
        layer.bias: torch.einsum("nc...->nc", backprops),
    }
    return {parameter: gradient for parameter, gradient in found.items() if parameter.requires_grad}


@register_norm_sampler(ChannelAffine)  # type: ignore[untyped-decorator]  # opacus has no types
def sample_norms(layer: ChannelAffine, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Their lengths, ``(N,)``."""
    return {p: gradient.norm(dim=1) for p, gradient in sample_gradients(layer, activations, backprops).items()}
