"""Recurrent layers whose gates and states are normalised by their moments."""

from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from normprop.errors import NormPropError
from normprop.nn.recurrence import RecurrentLayer, gate_moments


class RNN(RecurrentLayer):
    """Elman network with normalised states (after Laurent, Ballas & Vincent, 2017)::

        h_t = (1/c1) [ σ(γ_x Ŵ_x x_t + γ_h Ŵ_h h_{t−1} + b) − c2 ]

    where Ŵ has rows of unit length and c2, c1 are the mean and std of σ at N(0, γ_x² + γ_h²), for γ_x = γ_h =
    `gain_init` whatever they become. Assumes standardised inputs that are independent of the state. Dropout isn't
    offered: it changes these moments.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        num_layers: How many are stacked.
        nonlinearity: "tanh" or "relu".
        bias: Whether there is a b; one, where torch has two that add.
        batch_first: Whether input and output are `(N, L, *)`; states never are.
        device: Of the parameters.
        dtype: Of the parameters.
        gain_init: What γ_x and γ_h start at.

    Shapes:
        Input `(L, N, input_size)` or `(L, input_size)`, states `(num_layers, N, hidden_size)`, as in torch.

    Raises:
        NormPropError: An unknown nonlinearity, a size below one, or an input that doesn't fit.

    >>> output, state = RNN(3, 8, num_layers=2)(torch.randn(5, 2, 3))
    >>> output.shape, state.shape
    (torch.Size([5, 2, 8]), torch.Size([2, 2, 8]))
    """

    _gates = 1
    _states = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        gain_init: float = 1.0,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, device, dtype, gain_init)
        if nonlinearity not in ("tanh", "relu"):
            raise NormPropError(f"RNN: unknown nonlinearity {nonlinearity!r}.\nGive 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        gate = gate_moments(nonlinearity, 2**0.5 * gain_init)
        self._mean, self._std = gate.mean, gate.var**0.5
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs of the last layer at all times, and the last state of all layers."""
        output, (state,) = self._run(input, None if hx is None else (hx,))
        return output, state

    def _step(self, drive: Tensor, recurrent: Tensor, _state: tuple[Tensor, ...], _layer: int, /) -> tuple[Tensor, ...]:
        activation = torch.tanh if self.nonlinearity == "tanh" else torch.relu
        return ((activation(drive + recurrent) - self._mean) / self._std,)


class LSTM(RecurrentLayer):
    """LSTM with normalised outputs, by Recurrent Normalization Propagation (Laurent, Ballas & Vincent, 2017)::

        (i, f, g, o) = γ_x Ŵ_x x_t + γ_h Ŵ_h h_{t−1} + b
        c_t = σ(f) c_{t−1} + σ(i) tanh(g)
        h_t = (1/√Var h) σ(o) tanh(γ_c c_t / √Var c)

        Var c = Var tanh(g) (Var σ(i) + (E σ(i))²) / (1 − Var σ(f) − (E σ(f))²)
        Var h = Var tanh(γ_c z) (Var σ(o) + (E σ(o))²)        z ~ N(0, 1)

    where Ŵ has rows of unit length and the gates are N(0, γ_x² + γ_h²), for γ_x = γ_h = `gain_init` and γ_c =
    `cell_gain_init` whatever they become. Assumes standardised inputs, and gates that are independent of each other and
    of the cell; c = 0 at the start has less variance than in the long run. Arguments, shapes and errors as in `RNN`;
    gains of 2, 2 and 1 are the paper's for characters. `proj_size`, dropout and two directions aren't offered.

    >>> output, (h, c) = LSTM(3, 8, batch_first=True)(torch.randn(2, 5, 3))
    >>> output.shape, h.shape, c.shape
    (torch.Size([2, 5, 8]), torch.Size([1, 2, 8]), torch.Size([1, 2, 8]))
    """

    _gates = 4
    _states = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        gain_init: float = 2.0,
        cell_gain_init: float = 1.0,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, device, dtype, gain_init)
        if not cell_gain_init > 0:
            raise NormPropError(f"LSTM: cell_gain_init is {cell_gain_init}.\nGive a positive number; 1 is usual.")
        self.cell_gain_init = cell_gain_init
        for layer in range(num_layers):
            gain = Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
            self.register_parameter(f"gain_cell_l{layer}", gain)
        gate, update = gate_moments("sigmoid", 2**0.5 * gain_init), gate_moments("tanh", 2**0.5 * gain_init)
        self._cell_std = (update.var * gate.second / (1 - gate.second)) ** 0.5
        self._std = (gate_moments("tanh", cell_gain_init).var * gate.second) ** 0.5
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in `RNN`, and γ_c as `cell_gain_init`."""
        super().reset_parameters()
        for layer in range(self.num_layers):
            torch.nn.init.constant_(getattr(self, f"gain_cell_l{layer}"), self.cell_gain_init)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs of the last layer at all times, and the last (h, c) of all layers."""
        output, (state, cell) = self._run(input, hx)
        return output, (state, cell)

    def _step(self, drive: Tensor, recurrent: Tensor, state: tuple[Tensor, ...], layer: int, /) -> tuple[Tensor, ...]:
        i, f, g, o = (drive + recurrent).chunk(4, dim=-1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        gain = cast(Tensor, getattr(self, f"gain_cell_l{layer}"))
        return torch.sigmoid(o) * torch.tanh(gain / self._cell_std * cell) / self._std, cell


class GRU(RecurrentLayer):
    """GRU with normalised states, derived as Laurent, Ballas & Vincent (2017) derive their LSTM; they have no GRU::

        r, z = σ(γ_x Ŵ_x x_t + γ_h Ŵ_h h_{t−1} + b)
        n = tanh(γ_x Ŵ_x x_t + b + r (γ_h Ŵ_h h_{t−1}))
        h_t = (1 − z) n / √V + z h_{t−1}            V = Var n · E(1 − z)² / (1 − E z²)

    V makes var h = 1 in the long run. r and z are at N(0, γ_x² + γ_h²), n at N(0, γ_x² + γ_h² E r²), for γ_x = γ_h =
    `gain_init` whatever they become. Assumes standardised inputs, and gates that are independent of each other and of
    the state. Arguments, shapes and errors as in `RNN`.

    >>> output, state = GRU(3, 8)(torch.randn(5, 3))
    >>> output.shape, state.shape
    (torch.Size([5, 8]), torch.Size([1, 8]))
    """

    _gates = 3
    _states = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        gain_init: float = 1.0,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, device, dtype, gain_init)
        gate = gate_moments("sigmoid", 2**0.5 * gain_init)
        candidate = gate_moments("tanh", gain_init * (1 + gate.second) ** 0.5)
        self._std = (candidate.var * gate.complement / (1 - gate.second)) ** 0.5
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs of the last layer at all times, and the last state of all layers."""
        output, (state,) = self._run(input, None if hx is None else (hx,))
        return output, state

    def _step(self, drive: Tensor, recurrent: Tensor, state: tuple[Tensor, ...], _layer: int, /) -> tuple[Tensor, ...]:
        (xr, xz, xn), (hr, hz, hn) = drive.chunk(3, dim=-1), recurrent.chunk(3, dim=-1)
        z = torch.sigmoid(xz + hz)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return ((1 - z) * n / self._std + z * state[0],)
