"""An LSTM over a whole sequence in one autograd function: one matrix product a step, one for all gradients of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normprop.activations.fast_moments import eager
from normprop.double_backward import gradients_again
from normprop.nn.recurrent_block import Block, lstm_step
from normprop.nn.unrolling import unroll


def fits(drive: Tensor, state: tuple[Tensor, ...], block: Block) -> bool:
    """Whether `lstm_sequence` takes it: no projection, nothing that looks on at operations, no forward-mode derivative."""
    watched = forward_ad._current_level >= 0 or torch.is_autocast_enabled(drive.device.type)
    return block.weight_hr is None and drive.numel() > 0 and not watched and all(map(eager, (drive, *state)))


def lstm_sequence(drive: Tensor, state: tuple[Tensor, ...], block: Block) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y at all times, `(L, N, hidden_size)`, and the last (y, c).

    Equal to `unroll` with `lstm_step`, of which it is the derivative written out; differentiated twice it *is* that.

    Args:
        drive: What the input contributes to i, f, g and o, `(L, N, 4 · hidden_size)`.
        state: (y, c) before the first time.
        block: Without a projection.
    """
    y, c = state
    outputs, last = _LSTM.apply(drive, y, c, block.weight_hh, block.cell)
    return outputs, (outputs[-1], last)


def _unrolled(drive: Tensor, y: Tensor, c: Tensor, weight: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs, (_, last) = unroll(lstm_step, drive.unbind(0), (y, c), Block(weight, weight, cell=cell))
    return torch.stack(outputs), last


class _LSTM(torch.autograd.Function):
    """With t = tanh(cell · c), d the gradient of what it stands beside and u what comes out of the matrix product::

    dh_t = dy_t + W^T du_{t+1}                        dc_t = f_{t+1} dc_{t+1} + dh_t o (1 − t²) cell
    du_o = dh_t t o(1 − o)                            du_i = dc_t g i(1 − i)
    du_f = dc_t c_{t−1} f(1 − f)                      du_g = dc_t i (1 − g²)
    dW = Σ_t du_t y_{t−1}^T                           dcell = Σ_t dh_t o (1 − t²) c_t
    """

    @staticmethod
    def forward(ctx: Any, drive: Tensor, y: Tensor, c: Tensor, weight: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
        steps, count, size = *drive.shape[:2], y.shape[-1]
        gates = torch.empty_like(drive, memory_format=torch.contiguous_format)
        ys, cells, t = drive.new_empty(3, steps + 1, count, size).unbind(0)
        ys[0], cells[0] = y, c
        turned = weight.t()
        for k in range(steps):
            at, new = gates[k], cells[k + 1]
            torch.addmm(drive[k], ys[k], turned, out=at)
            at[:, : 2 * size].sigmoid_()
            at[:, 2 * size : 3 * size].tanh_()
            at[:, 3 * size :].sigmoid_()
            i, f, g, o = at.chunk(4, dim=-1)
            torch.mul(f, cells[k], out=new).addcmul_(i, g)
            inside = new if cell is None else torch.mul(new, cell, out=t[k])
            torch.tanh(inside, out=t[k])
            torch.mul(o, t[k], out=ys[k + 1])
        ctx.save_for_backward(drive, y, c, weight, cell, gates, ys, cells, t)
        return ys[1:], cells[steps].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        drive, y, c, weight, cell, gates, ys, cells, t = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (drive, y, c, weight, cell)
            return tuple(gradients_again(lambda given: _unrolled(*given), inputs, grads))
        outside, dc = grads
        steps, size = len(gates), weight.shape[1]
        i, f, g, o = gates.unflatten(-1, (4, size)).unbind(-2)
        t = t[:steps]
        through = torch.addcmul(o, o * t, t, value=-1)  # o (1 − t²): of dh, what arrives in cell · c
        slope = torch.empty_like(gates).unflatten(-1, (4, size))
        torch.mul(torch.addcmul(i, i, i, value=-1), g, out=slope[..., 0, :])
        torch.mul(torch.addcmul(f, f, f, value=-1), cells[:steps], out=slope[..., 1, :])
        torch.addcmul(i, i * g, g, value=-1, out=slope[..., 2, :])
        torch.mul(torch.addcmul(o, o, o, value=-1), t, out=slope[..., 3, :])
        to_cell = through if cell is None else through * cell
        dhs = torch.empty_like(ys[1:])
        du = None
        for k in reversed(range(steps)):
            dh, at = dhs[k], slope[k]
            torch.add(outside[k], 0, out=dh) if du is None else torch.addmm(outside[k], du, weight, out=dh)
            dc = torch.addcmul(dc, dh, to_cell[k])
            at[:, :3] *= dc.unsqueeze(1)
            at[:, 3] *= dh
            du = at.flatten(1)
            dc = dc * f[k]
        assert du is not None
        grad = slope.flatten(-2)
        needs = ctx.needs_input_grad
        return (
            grad if needs[0] else None,
            du @ weight if needs[1] else None,
            dc if needs[2] else None,
            grad.flatten(0, 1).t() @ ys[:steps].flatten(0, 1) if needs[3] else None,
            (dhs * through * cells[1:]).sum((0, 1)) if cell is not None and needs[4] else None,
        )
