"""What recurrent layers and cells share: parameters, their initialisation, and the plain layer that they amount to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from normprop.errors import NormPropError
from normprop.nn.filters import unit_filters
from normprop.nn.recurrent_block import Block
from normprop.nn.stationary import Gaussian, State, finite

Variances = Literal["fixed", "follow"]
Rows = Literal["graph", "projection"]


class Recurrence(torch.nn.Module, ABC):
    """A recurrence whose weights have rows of unit length and whose state is standardised by its moments.

    Every `suffix` stands for one layer in one direction: `weight_ih_l0`, `weight_hh_l0`, … of layer 0.
    """

    _gates: int
    _states: int
    # Whether what the input contributes may take both biases.
    _both_biases = True
    # The gate, if any, whose bias starts at `open_bias`, and the argument for it.
    _open_gate: int | None = None
    _open_argument = ""
    _fixed: dict[str, float]
    hidden_size: int

    def _configure(
        self,
        *,
        bias: bool,
        gain_ih_init: float,
        gain_hh_init: float,
        recurrent_dropout: float,
        variances: Variances,
        unit_rows: Rows,
        open_bias: float = 0.0,
    ) -> None:
        for name, gain in (("gain_ih_init", gain_ih_init), ("gain_hh_init", gain_hh_init)):
            if not 0 < gain < float("inf"):
                self._refuse(f"{name} is {gain}", "Give a positive number; 1 or 2 is usual.")
        if not 0 <= recurrent_dropout < 1:
            self._refuse(f"recurrent_dropout is {recurrent_dropout}", "Give a probability, 0 or more and below 1.")
        if variances not in ("fixed", "follow"):
            self._refuse(f"unknown variances {variances!r}", "Give 'fixed' (to the initial gains) or 'follow'.")
        if unit_rows not in ("graph", "projection"):
            self._refuse(f"unknown unit_rows {unit_rows!r}", "Give 'graph' or 'projection'.")
        if open_bias and not bias:
            self._refuse(f"{self._open_argument} is {open_bias} without biases", "Leave it out, or give bias=True.")
        self.bias = bias
        self.gain_ih_init, self.gain_hh_init = gain_ih_init, gain_hh_init
        self.recurrent_dropout = recurrent_dropout
        self.variances = variances
        self.unit_rows = unit_rows
        self._open_bias = open_bias

    def _add_block(self, suffix: str, input_size: int, hidden_size: int, state_size: int, **factory: Any) -> None:
        """Empty parameters of one layer in one direction, in torch's order and with our gains after them."""
        rows = self._gates * hidden_size
        shapes: dict[str, tuple[int, ...] | None] = {
            "weight_ih": (rows, input_size),
            "weight_hh": (rows, state_size),
            "bias_ih": (rows,) if self.bias else None,
            "bias_hh": (rows,) if self.bias else None,
            **({"weight_hr": (state_size, hidden_size)} if state_size != hidden_size else {}),
            "gain_ih": (rows,),
            "gain_hh": (rows,),
            **({"gain_cell": (hidden_size,)} if self._has_cell_gain() else {}),
        }
        for name, shape in shapes.items():
            self.register_parameter(name + suffix, None if shape is None else Parameter(torch.empty(shape, **factory)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal weights, gate by gate, with rows of unit length; γ and β as their arguments say, otherwise 0."""
        start = {"gain_ih": self.gain_ih_init, "gain_hh": self.gain_hh_init, "gain_cell": self._cell_gain()}
        for name, parameter in self.named_parameters():
            kind = "_".join(name.split("_")[:2])
            if kind.startswith("weight"):
                for gate in parameter.chunk(1 if kind == "weight_hr" else self._gates):
                    torch.nn.init.orthogonal_(gate)
                parameter.copy_(unit_filters(parameter))
            elif kind.startswith("bias"):
                parameter.zero_()
                if kind == "bias_ih" and self._open_gate is not None:
                    parameter.chunk(self._gates)[self._open_gate].fill_(self._open_bias)
            else:
                parameter.fill_(start[kind])

    def filters(self) -> Iterator[tuple[Parameter, int, int]]:
        """`(weight, channel_dim, groups)`, as for `filter_view`, of what may be rescaled."""
        for name, parameter in self.named_parameters():
            if name.startswith("weight"):
                yield parameter, 0, 1

    def state_moments(self, suffix: str = "_l0") -> State:
        """Predicted mean and standard deviation of the state before it is standardised, and an LSTM's cell's.

        Args:
            suffix: The layer and direction: "_l0", "_l1_reverse"; "" for a cell. Fixed variances are alike in all.
        """
        if self.variances == "fixed":
            return self._initial_state()
        gains = [self._get(name, suffix) for name in ("gain_ih", "gain_hh")]
        biases = [self._maybe(name, suffix) for name in ("bias_ih", "bias_hh")]
        of_input, of_state = (
            Gaussian(torch.zeros_like(gain) if bias is None else bias, gain.square())
            for gain, bias in zip(gains, biases, strict=True)
        )
        return self._state(of_input, of_state, self._maybe("gain_cell", suffix))

    def _initial_state(self) -> State:
        """That of the initial gains and biases, in float64 and `(1,)` each."""
        bias = torch.zeros(self._gates, dtype=torch.float64, device="cpu")
        if self._open_gate is not None:
            bias[self._open_gate] = self._open_bias
        row = torch.ones_like(bias)
        of_input = Gaussian(bias, row * self.gain_ih_init**2)
        of_state = Gaussian(torch.zeros_like(bias), row * self.gain_hh_init**2)
        gain_cell = bias.new_full((1,), self._cell_gain()) if self._has_cell_gain() else None
        with torch.no_grad():
            state = self._state(of_input, of_state, gain_cell)
        return finite(state, type(self).__name__)

    def _fix(self) -> None:
        """Keep the moments of the initial gains as numbers."""
        self._fixed = {}
        state = self._initial_state()  # refuses what has no deviation, whatever the variances are to follow
        if self.variances == "fixed":
            mean, std = state.mean.item(), state.std.item()
            self._fixed = {"mean": mean if abs(mean) > 1e-12 * std else 0.0, "std": std}
            if state.cell_std is not None:
                self._fixed["cell_std"] = state.cell_std.item()

    def _block(self, suffix: str) -> Block:
        """The plain layer that one of ours amounts to: unit rows times gains, the state's standardisation taken in."""
        weight_ih = self._rows("weight_ih", "gain_ih", suffix)
        weight_hh = self._rows("weight_hh", "gain_hh", suffix)
        bias_ih, bias_hh = self._maybe("bias_ih", suffix), self._maybe("bias_hh", suffix)
        scale, shift, cell = self._standardization(suffix, weight_hh)
        weight_hr = None
        if self._maybe("weight_hr", suffix) is not None:  # the projection takes the standardisation in
            weight_hr = self._rows("weight_hr", None, suffix)
            shift = None if shift is None else F.linear(shift, weight_hr)
            weight_hr, scale = weight_hr * scale, 1.0
        if shift is not None:
            moved = F.linear(shift, weight_hh)
            bias_hh = moved if bias_hh is None else bias_hh + moved
        if not (isinstance(scale, float) and scale == 1.0):
            weight_hh = weight_hh * scale
        gain_cell = self._maybe("gain_cell", suffix)
        cell = None if cell is None or gain_cell is None else (gain_cell / cell).to(weight_hh.dtype)
        return Block(weight_ih, weight_hh, bias_ih, bias_hh, cell, weight_hr, scale, shift)

    def _standardization(self, suffix: str, like: Tensor) -> tuple[float | Tensor, Tensor | None, float | Tensor | None]:
        """Scale and shift that standardise the state, and the standard deviation of an LSTM's cell."""
        if self._fixed:
            mean, std = self._fixed["mean"], self._fixed["std"]
            shift = like.new_full((self.hidden_size,), -mean / std) if mean else None
            return 1 / std, shift, self._fixed.get("cell_std")
        state = self.state_moments(suffix)
        scale = (1 / state.std).to(like.dtype)
        return scale, -state.mean.to(like.dtype) * scale, state.cell_std

    def _rows(self, weight: str, gain: str | None, suffix: str) -> Tensor:
        """Unit rows times gains; rows are taken to have unit length where they are kept so by projection."""
        rows = self._get(weight, suffix)
        factor = None if gain is None else self._get(gain, suffix)
        if self.unit_rows == "graph":
            return unit_filters(rows, factor)
        return rows if factor is None else rows * factor.unsqueeze(1)

    def _get(self, name: str, suffix: str) -> Tensor:
        return cast(Tensor, getattr(self, name + suffix))

    def _maybe(self, name: str, suffix: str) -> Tensor | None:
        return cast(Tensor | None, getattr(self, name + suffix, None))

    def _refuse(self, what: str, remedy: str) -> None:
        raise NormPropError(f"{type(self).__name__}: {what}.\n{remedy}")

    def _options(self) -> list[str]:
        """Our own arguments for `extra_repr`."""
        parts = [f"gain_ih_init={self.gain_ih_init}, gain_hh_init={self.gain_hh_init}"]
        parts += [f"{self._open_argument}={self._open_bias}"] if self._open_bias else []
        parts += [f"recurrent_dropout={self.recurrent_dropout}"] if self.recurrent_dropout else []
        parts += [f"variances={self.variances!r}"] if self.variances != "fixed" else []
        return parts + ([f"unit_rows={self.unit_rows!r}"] if self.unit_rows != "graph" else [])

    def _has_cell_gain(self) -> bool:
        return False

    def _cell_gain(self) -> float:
        return 1.0

    def _state_size(self) -> int:
        return self.hidden_size

    @abstractmethod
    def _state(self, of_input: Gaussian, of_state: Gaussian, gain_cell: Tensor | None) -> State:
        """Moments of the state where input and state contribute so to the pre-activations of all gates."""

    @abstractmethod
    def _step(self, drive: Tensor, state: tuple[Tensor, ...], block: Block, /) -> tuple[Tensor, ...]: ...


def joint(of_input: Gaussian, of_state: Gaussian) -> Gaussian:
    """Those of the sum of two independent contributions."""
    return Gaussian(of_input.mean + of_state.mean, of_input.var + of_state.var)
