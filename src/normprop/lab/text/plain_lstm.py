"""An LSTM without normalisation, with the loop of `normprop.nn.LSTM`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normprop.nn.lstm_sequence import fits, lstm_sequence
from normprop.nn.recurrent_block import Block, lstm_step
from normprop.nn.unrolling import unroll

Pair = tuple[Tensor, Tensor]


class PlainLSTM(nn.Module):
    """One layer, with torch's parameters and one bias; orthogonal recurrent weights, Glorot's for the input, gate by gate.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        forget_bias: What the bias of the forget gate starts at.

    Shapes:
        Input `(L, N, input_size)`, states `(1, N, hidden_size)`.

    Example:
        >>> output, (h, c) = PlainLSTM(3, 8)(torch.randn(5, 2, 3))
        >>> output.shape, h.shape, c.shape
        (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]), torch.Size([1, 2, 8]))
    """

    def __init__(self, input_size: int, hidden_size: int, *, forget_bias: float = 0.0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        start_gates(self.weight_ih, self.weight_hh, self.bias, forget_bias)

    def forward(self, x: Tensor, hx: Pair | None = None) -> tuple[Tensor, Pair]:
        """Outputs at all times, and the last (h, c)."""
        block = Block(self.weight_ih, self.weight_hh, self.bias)
        state: tuple[Tensor, ...] = started(x, hx, self.hidden_size)
        drive = block.drive(x, both=True)
        if fits(drive, state, block):
            output, state = lstm_sequence(drive, state, block)
        else:
            outputs, state = unroll(lstm_step, drive.unbind(0), state, block)
            output = torch.stack(outputs)
        return output, (state[0].unsqueeze(0), state[1].unsqueeze(0))


@torch.no_grad()
def start_gates(weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, forget_bias: float) -> None:
    """Initialise the four gates of an LSTM, in torch's order."""
    for gate in weight_ih.chunk(4):
        nn.init.xavier_uniform_(gate)
    for gate in weight_hh.chunk(4):
        nn.init.orthogonal_(gate)
    bias.zero_().chunk(4)[1].fill_(forget_bias)


def started(x: Tensor, hx: Pair | None, hidden_size: int) -> Pair:
    """The states before the first time, `(N, hidden_size)` each; zero where there are none."""
    if hx is None:
        zero = x.new_zeros(x.shape[1], hidden_size)
        return zero, zero
    return hx[0].squeeze(0), hx[1].squeeze(0)
