"""Recurrent layers whose gates and states are normalised by their moments."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normprop.nn.kinds import ElmanKind, GRUKind, LSTMKind
from normprop.nn.lstm_sequence import fits, lstm_sequence
from normprop.nn.plain_recurrent import plain_lstm, plain_states
from normprop.nn.recurrence import Rows, Variances
from normprop.nn.recurrent_block import Block
from normprop.nn.recurrent_layer import RecurrentLayer

Pair = tuple[Tensor, Tensor]


class RNN(ElmanKind, RecurrentLayer):
    """Elman network with normalised states (after Laurent, Ballas & Vincent, 2017)::

        h_t = (1/c1) [ σ(γ_x Ŵ_x x_t + γ_h Ŵ_h h_{t−1} + b) − c2 ]

    where Ŵ has rows of unit length and c2, c1 are the mean and std of σ at N(0, γ_x² + γ_h²), for γ_x = `gain_ih_init` and
    γ_h = `gain_hh_init` whatever they become; with `variances="follow"` at N(b, γ_x² + γ_h²), unit by unit. Assumes
    standardised inputs that are independent of the state. Parameters are named and shaped as in torch, and γ_x and γ_h are
    `gain_ih_l0` and `gain_hh_l0`.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        num_layers: How many are stacked.
        nonlinearity: "tanh" or "relu".
        bias: Whether there are b; two that add, as in torch.
        batch_first: Whether input and output are `(N, L, *)`; states never are.
        dropout: Between layers, in training. It scales the variance of what the next layer gets by 1/(1 − dropout).
        bidirectional: Whether a second recurrence runs from the end to the start; outputs are side by side.
        device: Of the parameters.
        dtype: Of the parameters.
        gain_ih_init: What γ_x starts at.
        gain_hh_init: What γ_h starts at.
        recurrent_dropout: The probability with which an element of the state stays as it was (zoneout, Krueger et al.,
            2017); in evaluation it is the mean of both. Unlike dropout this leaves the state's variance as it is.
        variances: "fixed" to the initial gains, as the authors have it, or "follow" gains and biases.
        unit_rows: "graph" divides rows by their lengths in every forward; "projection" takes them as they are, for
            `normprop.optim.UnitNormProjection` to keep at unit length.

    Shapes:
        Input `(L, N, input_size)` or `(L, input_size)` or packed, states `(num_layers · directions, N, hidden_size)`, as in
        torch.

    Raises:
        NormPropError: An argument out of range, or an input or a state that doesn't fit.

    >>> output, state = RNN(3, 8, num_layers=2)(torch.randn(5, 2, 3))
    >>> output.shape, state.shape
    (torch.Size([5, 2, 8]), torch.Size([2, 2, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gain_ih_init: float = 1.0,
        gain_hh_init: float = 1.0,
        recurrent_dropout: float = 0.0,
        variances: Variances = "fixed",
        unit_rows: Rows = "graph",
    ) -> None:
        self._choose(nonlinearity)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype,
            gain_ih_init, gain_hh_init, recurrent_dropout, variances, unit_rows, 0.0,
        )  # fmt: skip

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """Outputs of the last layer at all times, and the last state of all layers."""
        output, (state,) = self._run(input, None if hx is None else (hx,))
        return output, state

    def folded(self) -> torch.nn.Module:
        """The same function in plain torch: torch's RNN, with output and states scaled and shifted; no packed sequences.

        Raises:
            NormPropError: There is recurrent dropout.
        """
        plain = torch.nn.RNN(
            self.input_size, self.hidden_size, self.num_layers, self.nonlinearity, True, self.batch_first, self.dropout,
            self.bidirectional, device=self.weight_ih_l0.device, dtype=self.weight_ih_l0.dtype,
        )  # fmt: skip
        return plain_states(self, plain)


class LSTM(LSTMKind, RecurrentLayer):
    """LSTM with normalised outputs, by Recurrent Normalization Propagation (Laurent, Ballas & Vincent, 2017)::

        (i, f, g, o) = γ_x Ŵ_x x_t + γ_h Ŵ_h h_{t−1} + b
        c_t = σ(f) c_{t−1} + σ(i) tanh(g)
        h_t = (1/√Var h) σ(o) tanh(γ_c c_t / √Var c)

        Var c = Var tanh(g) (Var σ(i) + (E σ(i))²) / (1 − Var σ(f) − (E σ(f))²)
        Var h = Var tanh(γ_c z) (Var σ(o) + (E σ(o))²)        z ~ N(0, 1)

    where Ŵ has rows of unit length and the gates are N(b, γ_x² + γ_h²), for γ and b as they are initially whatever they
    become; with `variances="follow"` for γ and b as they are, unit by unit, and the mean of h taken off too. Assumes
    standardised inputs, and gates that are independent of each other and of the cell; c = 0 at the start has less variance
    than in the long run. Arguments, shapes and errors as in `RNN`, and:

    Args:
        proj_size: Features of the state if it is projected, Ŵ_r h_t with rows of unit length; 0 for no projection.
        gain_cell_init: What γ_c starts at; None for tanh(c_t) without γ_c and √Var c, which torch's own LSTM computes too,
            so that `normprop.fold` gives one.
        forget_bias: What b starts at in f.

    Gains of 2, 2 and 1 are those that the authors chose for characters.

    >>> output, (h, c) = LSTM(3, 8, batch_first=True)(torch.randn(2, 5, 3))
    >>> output.shape, h.shape, c.shape
    (torch.Size([2, 5, 8]), torch.Size([1, 2, 8]), torch.Size([1, 2, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gain_ih_init: float = 2.0,
        gain_hh_init: float = 2.0,
        gain_cell_init: float | None = 1.0,
        forget_bias: float = 0.0,
        recurrent_dropout: float = 0.0,
        variances: Variances = "fixed",
        unit_rows: Rows = "graph",
    ) -> None:
        self._choose(gain_cell_init)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype,
            gain_ih_init, gain_hh_init, recurrent_dropout, variances, unit_rows, forget_bias,
        )  # fmt: skip

    def forward(self, input: Tensor | PackedSequence, hx: Pair | None = None) -> tuple[Any, Pair]:
        """Outputs of the last layer at all times, and the last (h, c) of all layers."""
        output, states = self._run(input, hx)
        return output, cast(Pair, states)

    def folded(self) -> torch.nn.Module:
        """The same output and h by `torch.nn.LSTM`, in which a projection scales h; c has one unit more.

        Raises:
            NormPropError: There are cell gains, for which it has no place, or recurrent dropout.
        """
        return plain_lstm(self)

    def _sequence(self, drive: Tensor, state: tuple[Tensor, ...], block: Block) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.recurrent_dropout == 0 and fits(drive, state, block):
            return lstm_sequence(drive, state, block)
        return super()._sequence(drive, state, block)


class GRU(GRUKind, RecurrentLayer):
    """GRU with normalised states, derived as Laurent, Ballas & Vincent (2017) derive their LSTM; they have no GRU::

        r, z = σ(γ_x Ŵ_x x_t + γ_h Ŵ_h h_{t−1} + b)
        n = tanh(γ_x Ŵ_x x_t + b + r (γ_h Ŵ_h h_{t−1} + b'))
        h_t = (1 − z) (n − E n) / √V + z h_{t−1}            V = Var n · E(1 − z)² / (1 − E z²)

    V makes var h = 1 in the long run. r and z are at N(b, γ_x² + γ_h²), n at N(0, γ_x² + γ_h² E r²), for γ and b as they are
    initially whatever they become; with `variances="follow"` for γ and b as they are, unit by unit. E n isn't 0 only there.
    Assumes standardised inputs, and gates that are independent of each other and of the state. Arguments, shapes and errors
    as in `RNN`, and:

    Args:
        update_bias: What b starts at in z; the higher, the longer a state is kept.

    >>> output, state = GRU(3, 8)(torch.randn(5, 3))
    >>> output.shape, state.shape
    (torch.Size([5, 8]), torch.Size([1, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gain_ih_init: float = 1.0,
        gain_hh_init: float = 1.0,
        update_bias: float = 0.0,
        recurrent_dropout: float = 0.0,
        variances: Variances = "fixed",
        unit_rows: Rows = "graph",
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype,
            gain_ih_init, gain_hh_init, recurrent_dropout, variances, unit_rows, update_bias,
        )  # fmt: skip

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """Outputs of the last layer at all times, and the last state of all layers."""
        output, (state,) = self._run(input, None if hx is None else (hx,))
        return output, state

    def folded(self) -> torch.nn.Module:
        """The same function in plain torch: torch's GRU, with output and states scaled and shifted; no packed sequences.

        Raises:
            NormPropError: There is recurrent dropout.
        """
        plain = torch.nn.GRU(
            self.input_size, self.hidden_size, self.num_layers, True, self.batch_first, self.dropout, self.bidirectional,
            device=self.weight_ih_l0.device, dtype=self.weight_ih_l0.dtype,
        )  # fmt: skip
        return plain_states(self, plain)
