"""An LSTM with layer normalisation, with a loop as economical as that of `normprop.nn.LSTM`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.lab.text.plain_lstm import Pair, start_gates, started

_EPS = 1e-5


class LayerNormLSTM(nn.Module):
    """One layer of Ba, Kiros & Hinton (2016), supplement, eqs 20–22, LN over all four gates together as there::

        (i, f, g, o) = LN(W_h h_{t−1}; α_h) + LN(W_x x_t; α_x) + b
        c_t = σ(f) c_{t−1} + σ(i) tanh(g)
        h_t = σ(o) tanh(LN(c_t; α_c, β_c))

    The shifts of the first two LNs are one bias, b. The input's part is computed for all times at once; the loop over time
    has its derivative written out, with one gradient of each weight for all times, as `normprop.nn.lstm_sequence` has.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        forget_bias: What the bias of the forget gate starts at.
        gain: What α_h and α_x start at; α_c starts at 1.

    Shapes:
        Input `(L, N, input_size)`, states `(1, N, hidden_size)`.

    Example:
        >>> output, (h, c) = LayerNormLSTM(3, 8)(torch.randn(5, 2, 3))
        >>> output.shape, h.shape, c.shape
        (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]), torch.Size([1, 2, 8]))
    """

    def __init__(self, input_size: int, hidden_size: int, *, forget_bias: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        self.gain_ih = nn.Parameter(torch.full((4 * hidden_size,), gain))
        self.gain_hh = nn.Parameter(torch.full((4 * hidden_size,), gain))
        self.gain_cell = nn.Parameter(torch.ones(hidden_size))
        self.bias_cell = nn.Parameter(torch.zeros(hidden_size))
        start_gates(self.weight_ih, self.weight_hh, self.bias, forget_bias)

    def forward(self, x: Tensor, hx: Pair | None = None) -> tuple[Tensor, Pair]:
        """Outputs at all times, and the last (h, c)."""
        h, c = started(x, hx, self.hidden_size)
        drive = F.layer_norm(F.linear(x, self.weight_ih), (4 * self.hidden_size,), self.gain_ih, self.bias, _EPS)
        output, c = _Sequence.apply(drive, h, c, self.weight_hh, self.gain_hh, self.gain_cell, self.bias_cell)
        return output, (output[-1:], c.unsqueeze(0))

    def unrolled(self, x: Tensor, hx: Pair | None = None) -> tuple[Tensor, Pair]:
        """`forward` in plain operations, one step after the other: what `forward` is tested against."""
        h, c = started(x, hx, self.hidden_size)
        drive = F.layer_norm(F.linear(x, self.weight_ih), (4 * self.hidden_size,), self.gain_ih, self.bias, _EPS)
        outputs = []
        for part in drive:
            inner = F.layer_norm(F.linear(h, self.weight_hh), (4 * self.hidden_size,), self.gain_hh, eps=_EPS)
            i, f, g, o = (part + inner).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, (self.hidden_size,), self.gain_cell, self.bias_cell, _EPS))
            outputs.append(h)
        return torch.stack(outputs), (h.unsqueeze(0), c.unsqueeze(0))


class _Sequence(torch.autograd.Function):
    """The loop over time: outputs `(L, N, hidden_size)` and the last cell. Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, drive: Tensor, h: Tensor, c: Tensor, weight: Tensor, gain: Tensor, gain_cell: Tensor, bias_cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        steps, count, size = *drive.shape[:2], h.shape[-1]
        gates, inner = torch.empty_like(drive), torch.empty_like(drive)
        hs, cells, t = drive.new_empty(3, steps + 1, count, size).unbind(0)
        statistics: list[tuple[Tensor, ...]] = []
        hs[0], cells[0] = h, c
        turned = weight.t()
        for k in range(steps):
            at, new = gates[k], cells[k + 1]
            torch.mm(hs[k], turned, out=inner[k])
            normed, *of_gates = torch.native_layer_norm(inner[k], (4 * size,), gain, None, _EPS)
            torch.add(drive[k], normed, out=at)
            at[:, : 2 * size].sigmoid_()
            at[:, 2 * size : 3 * size].tanh_()
            at[:, 3 * size :].sigmoid_()
            i, f, g, o = at.chunk(4, dim=-1)
            torch.mul(f, cells[k], out=new).addcmul_(i, g)
            inside, *of_cell = torch.native_layer_norm(new, (size,), gain_cell, bias_cell, _EPS)
            statistics.append((*of_gates, *of_cell))
            torch.tanh(inside, out=t[k])
            torch.mul(o, t[k], out=hs[k + 1])
        ctx.save_for_backward(weight, gain, gain_cell, bias_cell, gates, inner, hs, cells, t)
        ctx.statistics = statistics
        return hs[1:], cells[steps].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outside: Tensor, dc: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, gain_cell, bias_cell, gates, inner, hs, cells, t = ctx.saved_tensors
        steps, size = len(gates), weight.shape[1]
        i, f, g, o = gates.unflatten(-1, (4, size)).unbind(-2)
        t = t[:steps]
        through = torch.addcmul(o, o * t, t, value=-1)  # o (1 − t²): of dh, what arrives in LN(c)
        slope = torch.empty_like(gates).unflatten(-1, (4, size))
        torch.mul(torch.addcmul(i, i, i, value=-1), g, out=slope[..., 0, :])
        torch.mul(torch.addcmul(f, f, f, value=-1), cells[:steps], out=slope[..., 1, :])
        torch.addcmul(i, i * g, g, value=-1, out=slope[..., 2, :])
        torch.mul(torch.addcmul(o, o, o, value=-1), t, out=slope[..., 3, :])
        before = torch.empty_like(inner)  # d of W_h h
        dgain, dgain_cell, dbias_cell = torch.zeros_like(gain), torch.zeros_like(gain_cell), torch.zeros_like(gain_cell)
        norm_backward = torch.ops.aten.native_layer_norm_backward
        for k in reversed(range(steps)):
            dh = outside[k] if k == steps - 1 else torch.addmm(outside[k], before[k + 1], weight)
            at = slope[k]
            mean, rstd, cell_mean, cell_rstd = ctx.statistics[k]
            dcell, dg, db = norm_backward(
                dh * through[k], cells[k + 1], (size,), cell_mean, cell_rstd, gain_cell, bias_cell, [True, True, True]
            )
            dc, dgain_cell, dbias_cell = dc + dcell, dgain_cell.add_(dg), dbias_cell.add_(db)
            at[:, :3] *= dc.unsqueeze(1)
            at[:, 3] *= dh
            du = at.flatten(1)
            before[k], dg, _ = norm_backward(du, inner[k], (4 * size,), mean, rstd, gain, None, [True, True, False])
            dgain.add_(dg)
            dc = dc * f[k]
        grad = slope.flatten(-2)
        return (
            grad,
            before[0] @ weight,
            dc,
            before.flatten(0, 1).t() @ hs[:steps].flatten(0, 1),
            dgain,
            dgain_cell,
            dbias_cell,
        )
