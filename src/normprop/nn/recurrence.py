"""What the recurrent layers share: unit rows, gate moments and the loop over time."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from normprop.activations.activation_moments import moments
from normprop.errors import NormPropError
from normprop.nn.filters import unit_filters


class Gate(NamedTuple):
    """Mean, variance and second moment of a gate; the last of 1 − gate, too."""

    mean: float
    var: float
    second: float
    complement: float


def gate_moments(name: str, std: float) -> Gate:
    """The moments of the activation `name` at N(0, std²)."""
    output = moments(name, 0.0, std)
    mean, second = output.mean.item(), output.second.item()
    return Gate(mean, output.var.item(), second, 1 - 2 * mean + second)


class RecurrentLayer(torch.nn.Module, ABC):
    """Layers of one kind on top of each other: parameters, shapes and the loop over time."""

    _gates: int
    _states: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        gain_init: float,
    ) -> None:
        super().__init__()
        if min(input_size, hidden_size, num_layers) < 1:
            raise NormPropError(
                f"{type(self).__name__}: sizes {input_size} and {hidden_size}, {num_layers} layers.\n"
                "Each has to be 1 or more."
            )
        if not gain_init > 0:
            raise NormPropError(f"{type(self).__name__}: gain_init is {gain_init}.\nGive a positive number; 2 is usual.")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.gain_init = gain_init
        rows = self._gates * hidden_size
        new = partial(torch.empty, device=device, dtype=dtype)
        for layer in range(num_layers):
            columns = input_size if layer == 0 else hidden_size
            self.register_parameter(f"weight_ih_l{layer}", Parameter(new(rows, columns)))
            self.register_parameter(f"weight_hh_l{layer}", Parameter(new(rows, hidden_size)))
            self.register_parameter(f"gain_ih_l{layer}", Parameter(new(rows)))
            self.register_parameter(f"gain_hh_l{layer}", Parameter(new(rows)))
            self.register_parameter(f"bias_l{layer}", Parameter(new(rows)) if bias else None)

    def reset_parameters(self) -> None:
        """Orthogonal weights, gate by gate, with rows of unit length; β = 0, γ as `gain_init`."""
        for name, parameter in self.named_parameters():
            if name.startswith("weight"):
                for gate in parameter.detach().chunk(self._gates):
                    torch.nn.init.orthogonal_(gate)
                with torch.no_grad():
                    parameter.copy_(unit_filters(parameter))
            else:
                torch.nn.init.constant_(parameter, 0.0 if name.startswith("bias") else self.gain_init)

    def filters(self) -> Iterator[tuple[Parameter, int, int]]:
        """`(weight, channel_dim, groups)`, as for `filter_view`, of what may be rescaled."""
        for name, parameter in self.named_parameters():
            if name.startswith("weight"):
                yield parameter, 0, 1

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults, after the sizes."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [f"num_layers={self.num_layers}"] if self.num_layers > 1 else []
        parts += ["bias=False"] if not self.bias else []
        parts += ["batch_first=True"] if self.batch_first else []
        return ", ".join([*parts, f"gain_init={self.gain_init}"])

    def _run(self, input: Tensor, states: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers over all times; states are `(num_layers, N, hidden_size)` each."""
        if isinstance(input, PackedSequence):
            raise NormPropError(f"{type(self).__name__}: packed sequences aren't supported.\nGive a padded tensor.")
        if not input.is_floating_point() or input.ndim not in (2, 3) or input.shape[-1] != self.input_size:
            raise NormPropError(
                f"{type(self).__name__}: the input is {tuple(input.shape)}, {input.dtype}.\n"
                f"Give a real sequence of two or three dimensions, the last of size {self.input_size}."
            )
        batched = input.ndim == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        if states is None:
            states = (x.new_zeros(self.num_layers, x.shape[1], self.hidden_size),) * self._states
        elif not batched:
            states = tuple(state.unsqueeze(1) for state in states)
        finals = []
        for layer in range(self.num_layers):
            drive = F.linear(x, self._unit("ih", layer), cast(Tensor | None, getattr(self, f"bias_l{layer}")))
            recurrent = self._unit("hh", layer)
            state, outputs = tuple(s[layer] for s in states), []
            for step in drive.unbind(0):
                state = self._step(step, F.linear(state[0], recurrent), state, layer)
                outputs.append(state[0])
            x = torch.stack(outputs) if outputs else x.new_zeros(0, x.shape[1], self.hidden_size)
            finals.append(state)
        last = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        if not batched:
            return x.squeeze(1), tuple(state.squeeze(1) for state in last)
        return x.transpose(0, 1) if self.batch_first else x, last

    def _unit(self, kind: str, layer: int) -> Tensor:
        return unit_filters(getattr(self, f"weight_{kind}_l{layer}"), getattr(self, f"gain_{kind}_l{layer}"))

    @abstractmethod
    def _step(self, drive: Tensor, recurrent: Tensor, state: tuple[Tensor, ...], layer: int, /) -> tuple[Tensor, ...]:
        """The next state from γ_x Ŵ_x x + b, γ_h Ŵ_h h and the state before; its first part is the output."""
