"""The three kinds of recurrence: their gates, one step in time, and the moments of their states."""

from __future__ import annotations

from torch import Tensor

from normprop.nn.recurrence import Recurrence, joint
from normprop.nn.recurrent_block import Block, elman_step, gru_step, lstm_step
from normprop.nn.stationary import Gaussian, State, elman_state, gru_state, lstm_state


class ElmanKind(Recurrence):
    """One state, σ of what input and state contribute."""

    _gates = 1
    _states = 1

    def _choose(self, nonlinearity: str) -> None:
        if nonlinearity not in ("tanh", "relu"):
            self._refuse(f"unknown nonlinearity {nonlinearity!r}", "Give 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity

    def _state(self, of_input: Gaussian, of_state: Gaussian, _gain_cell: Tensor | None) -> State:
        return elman_state(self.nonlinearity, joint(of_input, of_state))

    def _step(self, drive: Tensor, state: tuple[Tensor, ...], block: Block, /) -> tuple[Tensor, ...]:
        return elman_step(self.nonlinearity, drive, state, block)

    def _options(self) -> list[str]:
        return ([] if self.nonlinearity == "tanh" else [f"nonlinearity={self.nonlinearity!r}"]) + super()._options()


class LSTMKind(Recurrence):
    """Four gates (i, f, g, o), a state and a cell."""

    _gates = 4
    _states = 2
    _open_gate = 1
    _open_argument = "forget_bias"

    def _choose(self, gain_cell_init: float | None) -> None:
        if gain_cell_init is not None and not 0 < gain_cell_init < float("inf"):
            self._refuse(f"gain_cell_init is {gain_cell_init}", "Give a positive number, or None for no gain.")
        self.gain_cell_init = gain_cell_init

    def _state(self, of_input: Gaussian, of_state: Gaussian, gain_cell: Tensor | None) -> State:
        return lstm_state(joint(of_input, of_state).rows(4), gain_cell)

    def _step(self, drive: Tensor, state: tuple[Tensor, ...], block: Block, /) -> tuple[Tensor, ...]:
        return lstm_step(drive, state, block)

    def _options(self) -> list[str]:
        first, *rest = super()._options()
        return [first, f"gain_cell_init={self.gain_cell_init}", *rest]

    def _has_cell_gain(self) -> bool:
        return self.gain_cell_init is not None

    def _cell_gain(self) -> float:
        return 1.0 if self.gain_cell_init is None else self.gain_cell_init


class GRUKind(Recurrence):
    """Two gates (r, z), a candidate n and a state."""

    _gates = 3
    _states = 1
    _both_biases = False
    _open_gate = 1
    _open_argument = "update_bias"

    def _state(self, of_input: Gaussian, of_state: Gaussian, _gain_cell: Tensor | None) -> State:
        reset, update, _ = joint(of_input, of_state).rows(3)
        return gru_state([reset, update, of_input.rows(3)[2]], of_state.rows(3)[2])

    def _step(self, drive: Tensor, state: tuple[Tensor, ...], block: Block, /) -> tuple[Tensor, ...]:
        return gru_step(drive, state, block)
