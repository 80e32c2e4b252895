"""One step of the recurrent layers, for loops of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor

from normprop.nn.kinds import ElmanKind, GRUKind, LSTMKind
from normprop.nn.recurrence import Recurrence, Rows, Variances
from normprop.nn.recurrent_block import Block
from normprop.nn.stationary import State
from normprop.nn.unrolling import zoneout

States = tuple[Tensor, ...]


class RecurrentCell(Recurrence):
    """The shapes and states of `torch.nn.RNNCell` and its siblings."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        gain_ih_init: float,
        gain_hh_init: float,
        recurrent_dropout: float,
        variances: Variances,
        unit_rows: Rows,
        open_bias: float,
    ) -> None:
        super().__init__()
        if min(input_size, hidden_size) < 1:
            self._refuse(f"sizes {input_size} and {hidden_size}", "Each has to be 1 or more.")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self._configure(
            bias=bias,
            gain_ih_init=gain_ih_init,
            gain_hh_init=gain_hh_init,
            recurrent_dropout=recurrent_dropout,
            variances=variances,
            unit_rows=unit_rows,
            open_bias=open_bias,
        )
        self._add_block("", input_size, hidden_size, hidden_size, device=device, dtype=dtype)
        self._fix()
        self.reset_parameters()

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults, after the sizes."""
        parts = [f"{self.input_size}, {self.hidden_size}"] + ([] if self.bias else ["bias=False"])
        return ", ".join(parts + self._options())

    def state_moments(self, suffix: str = "") -> State:
        """As of a layer; a cell has one, without a suffix."""
        return super().state_moments(suffix)

    def folded(self) -> torch.nn.Module:
        """Nothing: torch's cells have no place for what standardises the state.

        Raises:
            NormPropError: Always.
        """
        self._refuse("torch's cells can't scale their state", "Fold a layer, or keep the cell: it needs no data.")
        raise AssertionError

    def _advance(self, block: Block, input: Tensor, hx: States | None) -> States:
        """The next state, normalised; `(N, …)` or without N."""
        if not input.is_floating_point() or input.ndim not in (1, 2) or input.shape[-1] != self.input_size:
            self._refuse(
                f"the input is {tuple(input.shape)}, {input.dtype}",
                f"Give a real tensor of one or two dimensions, the last of size {self.input_size}.",
            )
        shape = (*input.shape[:-1], self.hidden_size)
        if hx is None:
            hx = (input.new_zeros(shape),) * self._states
        for state in hx:
            if state.shape != shape:
                self._refuse(f"a state has shape {tuple(state.shape)}", f"Give it shape {shape}.")
        old = (block.raw(hx[0]), *hx[1:])
        new = self._step(block.drive(input, both=self._both_biases), old, block)
        if self.recurrent_dropout:
            new = zoneout(old, new, self.recurrent_dropout, training=self.training)
        return (block.normalized(new[0]), *new[1:])


class RNNCell(ElmanKind, RecurrentCell):
    """One step of `RNN`, with the arguments and parameters of `torch.nn.RNNCell` and the gains.

    Each call divides the weights' rows by their lengths. A loop does so once if it calls `once()` before it and what that
    returns in it.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        bias: Whether there are b.
        nonlinearity: "tanh" or "relu".
        device: Of the parameters.
        dtype: Of the parameters.
        gain_ih_init: What γ_x starts at.
        gain_hh_init: What γ_h starts at.
        recurrent_dropout: As in `RNN`.
        variances: As in `RNN`.
        unit_rows: As in `RNN`.

    Shapes:
        Input `(N, input_size)` or `(input_size,)`, state `(N, hidden_size)` or `(hidden_size,)`.

    Raises:
        NormPropError: An argument out of range, or an input or a state that doesn't fit.

    >>> RNNCell(3, 8)(torch.randn(2, 3)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
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
            input_size, hidden_size, bias, device, dtype,
            gain_ih_init, gain_hh_init, recurrent_dropout, variances, unit_rows, 0.0,
        )  # fmt: skip

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next state."""
        return self.once()(input, hx)

    def once(self) -> Callable[..., Tensor]:
        """`forward` with the weights as they are now."""
        block = self._block("")
        return lambda input, hx=None: self._advance(block, input, None if hx is None else (hx,))[0]


class LSTMCell(LSTMKind, RecurrentCell):
    """One step of `LSTM`, with the arguments and parameters of `torch.nn.LSTMCell` and the gains; see `RNNCell`.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state and of the cell.
        bias: Whether there are b.
        device: Of the parameters.
        dtype: Of the parameters.
        gain_ih_init: What γ_x starts at.
        gain_hh_init: What γ_h starts at.
        gain_cell_init: As in `LSTM`.
        forget_bias: As in `LSTM`.
        recurrent_dropout: As in `RNN`.
        variances: As in `RNN`.
        unit_rows: As in `RNN`.

    >>> h, c = LSTMCell(3, 8)(torch.randn(2, 3))
    >>> h.shape, c.shape
    (torch.Size([2, 8]), torch.Size([2, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
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
            input_size, hidden_size, bias, device, dtype,
            gain_ih_init, gain_hh_init, recurrent_dropout, variances, unit_rows, forget_bias,
        )  # fmt: skip

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The next (h, c)."""
        return self.once()(input, hx)

    def once(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """`forward` with the weights as they are now."""
        block = self._block("")
        return lambda input, hx=None: cast(tuple[Tensor, Tensor], self._advance(block, input, hx))


class GRUCell(GRUKind, RecurrentCell):
    """One step of `GRU`, with the arguments and parameters of `torch.nn.GRUCell` and the gains; see `RNNCell`.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        bias: Whether there are b.
        device: Of the parameters.
        dtype: Of the parameters.
        gain_ih_init: What γ_x starts at.
        gain_hh_init: What γ_h starts at.
        update_bias: As in `GRU`.
        recurrent_dropout: As in `RNN`.
        variances: As in `RNN`.
        unit_rows: As in `RNN`.

    >>> GRUCell(3, 8)(torch.randn(3)).shape
    torch.Size([8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
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
            input_size, hidden_size, bias, device, dtype,
            gain_ih_init, gain_hh_init, recurrent_dropout, variances, unit_rows, update_bias,
        )  # fmt: skip

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next state."""
        return self.once()(input, hx)

    def once(self) -> Callable[..., Tensor]:
        """`forward` with the weights as they are now."""
        block = self._block("")
        return lambda input, hx=None: self._advance(block, input, None if hx is None else (hx,))[0]
