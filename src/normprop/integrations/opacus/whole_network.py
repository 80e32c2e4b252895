"""Opacus: a converted network as one layer, so that `PrivacyEngine` finds the gradient of each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from normprop.errors import NormPropError

_RANDOM = (nn.modules.dropout._DropoutNd,)


class WholeNetwork(nn.Module):
    """A network that Opacus treats as a single layer with all of its trainable parameters.

    Opacus takes the gradients of each sample by hooks on the modules that are called. Those of a converted network's layers
    are called with effective weights, and hooks would take the gradients of these. Seen as one layer its gradients are those
    of `torch.func`, exact because no sample sees another; the network is run a second time for them.

    Parameters are shared with the network: training this trains it. Save ``whole.network.state_dict()``, whose keys are the
    model's own.

    Args:
        network: what `normprop.convert` made, or any module that treats samples alone and returns one tensor.

    Raises:
        NormPropError: nothing in it is trainable.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> whole = WholeNetwork(normprop.convert(net))
        >>> whole(torch.randn(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = [network]  # in a list: its own modules are not to be hooked
        self.names = {name: name.replace(".", "/") for name, p in network.named_parameters() if p.requires_grad}
        if not self.names:
            raise NormPropError("the network has no trainable parameter.\nUnfreeze those that are to be trained.")
        for name, parameter in network.named_parameters():  # frozen ones too: processes are to start alike
            self.register_parameter(name.replace(".", "/"), parameter)
        self.training = network.training

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        return self._network[0]

    def forward(self, *inputs: Tensor) -> Tensor:
        """The network's output.

        Raises:
            NormPropError: the network drops at random, and would drop something else when its gradients are taken.
        """
        random = [path for path, m in self.network.named_modules() if isinstance(m, _RANDOM) and m.training and m.p > 0]
        if random:
            raise NormPropError(
                f"{random[0]} drops at random, and would drop something else when gradients are taken.\n"
                "Set its p to 0; clipping and noise regularise already."
            )
        return self.apply_with({name: getattr(self, flat) for name, flat in self.names.items()}, inputs)

    def apply_with(self, parameters: dict[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """The network's output with other trainable parameters, by their names in the network."""
        output: Tensor = functional_call(self.network, parameters, tuple(inputs))
        return output

    def train(self, mode: bool = True) -> WholeNetwork:
        """Set the network's mode."""
        super().train(mode)
        self.network.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WholeNetwork:
        """Move the network along, with what is not trainable."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types for it
        self.network._apply(fn, recurse)
        return self


@register_grad_sampler(WholeNetwork)  # type: ignore[untyped-decorator]  # opacus has no types
def sample_gradients(layer: WholeNetwork, activations: Sequence[Tensor], backprops: Tensor) -> dict[Any, Tensor]:
    """Gradients of each sample, as Opacus asks for them.

    Args:
        layer: the network.
        activations: its inputs, batch first.
        backprops: derivative of the loss with respect to its output, batch first.

    Returns:
        Parameter → tensor ``(N, *parameter.shape)``.
    """

    def weighted(parameters: dict[str, Tensor], weights: Tensor, *one: Tensor) -> Tensor:
        return (layer.apply_with(parameters, [x.unsqueeze(0) for x in one]) * weights).sum()

    parameters = {name: getattr(layer, flat) for name, flat in layer.names.items()}
    detached = {name: p.detach() for name, p in parameters.items()}
    gradients = vmap(grad(weighted), in_dims=(None, 0, *(0 for _ in activations)))(detached, backprops, *activations)
    return {parameters[name]: gradient for name, gradient in gradients.items()}
