"""One layer of a recurrent network, in one direction, as torch's cells know it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """Weights and biases with which torch's own cell computes y, and what turns y into the normalised state.

    h = scale · y + shift. Since a cell reads its state through a matrix, standardising the state is standardising
    weights: `weight_hh` takes y and `bias_hh` has what the mean of y contributes.

    Attributes:
        weight_ih: `(gates · hidden_size, input_size)`.
        weight_hh: `(gates · hidden_size, state_size)`.
        bias_ih: `(gates · hidden_size,)`, or None.
        bias_hh: Likewise.
        cell: What an LSTM's cell is multiplied with on its way into the tanh, `(hidden_size,)`; None for 1.
        weight_hr: An LSTM's projection `(state_size, hidden_size)`.
        scale: A number, or `(state_size,)`.
        shift: `(state_size,)`; None for 0.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    cell: Tensor | None = None
    weight_hr: Tensor | None = None
    scale: float | Tensor = 1.0
    shift: Tensor | None = None

    def normalized(self, y: Tensor) -> Tensor:
        """h for y."""
        h = y * self.scale
        return h if self.shift is None else h + self.shift

    def raw(self, h: Tensor) -> Tensor:
        """y for h."""
        return (h if self.shift is None else h - self.shift) / self.scale

    def drive(self, x: Tensor, *, both: bool) -> Tensor:
        """What the input contributes to all gates at all times; with `both` biases if the recurrence has none."""
        bias = self.bias_ih
        if both and self.bias_hh is not None:
            bias = self.bias_hh if bias is None else bias + self.bias_hh
        return F.linear(x, self.weight_ih, bias)


def elman_step(activation: str, drive: Tensor, state: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    """y = σ(drive + W y)."""
    u = drive + F.linear(state[0], block.weight_hh)
    return (torch.tanh(u) if activation == "tanh" else torch.relu(u),)


def lstm_step(drive: Tensor, state: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    """c = σ(f) c + σ(i) tanh(g), y = σ(o) tanh(cell · c), for (i, f, g, o) = drive + W y."""
    y, c = state
    i, f, g, o = (drive + F.linear(y, block.weight_hh)).chunk(4, dim=-1)
    c = torch.addcmul(torch.sigmoid(f) * c, torch.sigmoid(i), torch.tanh(g))
    y = torch.sigmoid(o) * torch.tanh(c if block.cell is None else block.cell * c)
    return y if block.weight_hr is None else F.linear(y, block.weight_hr), c


def gru_step(drive: Tensor, state: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    """y = (1 − z) n + z y, where n = tanh(drive + r (W y + b)), for r and z at drive + W y + b."""
    y = state[0]
    (xr, xz, xn), (hr, hz, hn) = (part.chunk(3, dim=-1) for part in (drive, F.linear(y, block.weight_hh, block.bias_hh)))
    n, z = torch.tanh(torch.addcmul(xn, torch.sigmoid(xr + hr), hn)), torch.sigmoid(xz + hz)
    return (torch.lerp(n.to(y.dtype), y, z.to(y.dtype)),)  # autocast has gates in lower precision than the state
