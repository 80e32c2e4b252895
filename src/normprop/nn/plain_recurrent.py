"""Recurrent layers of torch that compute what ours do, for deployment and export."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normprop.errors import NormPropError
from normprop.nn.recurrent_block import Block
from normprop.nn.recurrent_layer import RecurrentLayer

# A pre-activation at which sigmoid and tanh are 0 or 1 exactly, in half precision too.
_FAR = 1e4


@torch.no_grad()
def plain_lstm(layer: RecurrentLayer) -> nn.LSTM:
    """A `torch.nn.LSTM` with the same output and h.

    h = s·y + m, where y is what an LSTM computes, is a projection of y, and torch's LSTM has one (`proj_size`) as long as
    it makes the state smaller. So one unit is added to y. Where m isn't 0 it makes m: its gates are closed or open for good,
    such that it is always tanh 1. Weights of the state read h and stay as they are.

    Raises:
        NormPropError: There are cell gains, for which torch's LSTM has no place.
    """
    if getattr(layer, "gain_cell_init", None) is not None:
        raise NormPropError(
            "LSTM can't be folded: torch's has no factor between cell and tanh, where γ_c/√Var c stands.\n"
            "Build it with gain_cell_init=None, or keep it: it needs no data for inference either."
        )
    _check_zoneout(layer)
    suffixes = [suffix for suffixes in layer.suffixes() for suffix in suffixes]
    blocks = [layer._block(suffix) for suffix in suffixes]
    constant = any(block.shift is not None for block in blocks)
    extra = int(constant or not layer.proj_size)
    plain = nn.LSTM(
        layer.input_size,
        layer.hidden_size + extra,
        layer.num_layers,
        bias=layer.bias or constant,
        batch_first=layer.batch_first,
        dropout=layer.dropout,
        bidirectional=layer.bidirectional,
        proj_size=layer._state_size(),
        device=layer._get("weight_ih", suffixes[0]).device,
        dtype=layer._get("weight_ih", suffixes[0]).dtype,
    )
    far = (_FAR, -_FAR, _FAR, _FAR) if constant else (0.0, 0.0, 0.0, 0.0)  # i, f, g, o of the unit that is added
    for suffix, block in zip(suffixes, blocks, strict=True):
        rows = 4 * layer.hidden_size
        values = {
            "weight_ih": block.weight_ih,
            "weight_hh": layer._rows("weight_hh", "gain_hh", suffix),
            "bias_ih": _or_zeros(layer._maybe("bias_ih", suffix), rows, block.weight_ih),
            "bias_hh": _or_zeros(layer._maybe("bias_hh", suffix), rows, block.weight_ih),
        }
        for name, value in values.items():
            if hasattr(plain, name + suffix):
                of_unit = far if name == "bias_ih" else (0.0,) * 4
                gates = [_extended(gate, of_unit[k], extra) for k, gate in enumerate(value.chunk(4))]
                getattr(plain, name + suffix).copy_(torch.cat(gates))
        projection = block.weight_hr
        if projection is None:
            scale = torch.as_tensor(block.scale, dtype=block.weight_ih.dtype, device=block.weight_ih.device)
            projection = torch.diag(scale.expand(layer.hidden_size))
        if extra:
            mean = projection.new_zeros(len(projection)) if block.shift is None else block.shift / math.tanh(1.0)
            projection = torch.cat([projection, mean.unsqueeze(1)], 1)
        plain.get_parameter("weight_hr" + suffix).copy_(projection)
    return plain.train(layer.training)


@torch.no_grad()
def plain_states(layer: RecurrentLayer, plain: nn.GRU | nn.RNN) -> fx.GraphModule:
    """`plain` with our weights in it, its output and states scaled and shifted: h = s·y + m.

    Args:
        layer: A GRU or an RNN of ours.
        plain: torch's, of the same sizes, with biases.

    Returns:
        A graph that is called like the layer, except for packed sequences.
    """
    _check_zoneout(layer)
    before: tuple[Tensor, Tensor] | None = None
    scales, shifts = [], []
    for suffixes in layer.suffixes():
        blocks = [layer._block(suffix) for suffix in suffixes]
        for suffix, block in zip(suffixes, blocks, strict=True):
            weight, bias_hh = block.weight_ih, _or_zeros(block.bias_hh, len(block.weight_ih), block.weight_ih)
            bias_ih = _or_zeros(block.bias_ih, len(weight), weight)
            if before is not None:  # the layer below hands on y, not h
                bias_ih = bias_ih + F.linear(before[1], weight)
                weight = weight * before[0]
            values = {"weight_ih": weight, "weight_hh": block.weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
            for name, value in values.items():
                plain.get_parameter(name + suffix).copy_(value)
        rows = [_affine(block, layer.hidden_size) for block in blocks]
        before = torch.cat([scale for scale, _ in rows]), torch.cat([shift for _, shift in rows])
        scales += [scale for scale, _ in rows]
        shifts += [shift for _, shift in rows]
    assert before is not None
    root = nn.Module()
    root.add_module("recurrent", plain)
    constants = {"scale": before[0], "shift": before[1], "scales": torch.stack(scales), "shifts": torch.stack(shifts)}
    for name, value in constants.items():
        root.register_buffer(name, value.clone())
    return fx.GraphModule(root, _graph(layer.batch_first), type(plain).__name__).train(layer.training)


def _graph(batch_first: bool) -> fx.Graph:
    """y = (h − m)/s for the initial state, torch's layer, and h = s·y + m for what comes out."""
    graph = fx.Graph()
    call: Any = graph.call_function
    x, hx = graph.placeholder("input"), graph.placeholder("hx", default_value=None)
    scales, shifts = graph.get_attr("scales"), graph.get_attr("shifts")
    # (N, 1, 1) or, without a batch, (1, 1): states have the batch in the middle, `scales` (num_layers · directions, hidden).
    start = call(torch.select, (x, -2 if batch_first else 0, 0))
    start = call(torch.unsqueeze, (call(torch.zeros_like, (call(torch.narrow, (start, -1, 0, 1)),)), -2))
    zero = call(torch.movedim, (call(torch.add, (start, call(torch.zeros_like, (scales,)))), -2, 0))
    # Adds hx to zeros if there is one: an optional argument of torch's is the branch that a graph can't have.
    given = call(F.layer_norm, (zero, call(getattr, (zero, "shape")), None, hx))
    given = call(torch.movedim, (given, 0, -2))
    raw = call(torch.div, (call(torch.sub, (given, shifts)), scales))
    raw = graph.call_method("contiguous", (call(torch.movedim, (raw, -2, 0)),))
    both = graph.call_module("recurrent", (x, raw))
    y, last = (call(operator.getitem, (both, k)) for k in range(2))
    output = call(torch.addcmul, (graph.get_attr("shift"), y, graph.get_attr("scale")))
    last = call(torch.addcmul, (shifts, call(torch.movedim, (last, 0, -2)), scales))
    graph.output((output, call(torch.movedim, (last, -2, 0))))
    return graph


def _affine(block: Block, size: int) -> tuple[Tensor, Tensor]:
    like = block.weight_ih
    scale = torch.as_tensor(block.scale, dtype=like.dtype, device=like.device).expand(size)
    return scale, like.new_zeros(size) if block.shift is None else block.shift


def _or_zeros(bias: Tensor | None, rows: int, like: Tensor) -> Tensor:
    return like.new_zeros(rows) if bias is None else bias


def _extended(gate: Tensor, value: float, extra: int) -> Tensor:
    """Rows of one gate with `extra` more, of that value."""
    return torch.cat([gate, gate.new_full((extra, *gate.shape[1:]), value)])


def _check_zoneout(layer: RecurrentLayer) -> None:
    if layer.recurrent_dropout:
        raise NormPropError(
            f"{type(layer).__name__} can't be folded: torch's keeps no elements of a state as they were.\n"
            "Set recurrent_dropout to 0 to fold the layer as it is without."
        )
