"""Recurrent layers on top of each other, in one direction or two, over padded or packed sequences."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normprop.nn.recurrence import Recurrence, Rows, Variances
from normprop.nn.recurrent_block import Block
from normprop.nn.unrolling import unroll

States = tuple[Tensor, ...]


class RecurrentLayer(Recurrence):
    """The shapes, states and loops of `torch.nn.RNN` and its siblings."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
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
        if min(input_size, hidden_size, num_layers) < 1:
            self._refuse(f"sizes {input_size} and {hidden_size}, {num_layers} layers", "Each has to be 1 or more.")
        if not 0 <= proj_size < hidden_size:
            self._refuse(f"proj_size is {proj_size}", f"Give a size below {hidden_size}, the hidden one, or 0 for none.")
        if not 0 <= dropout <= 1:
            self._refuse(f"dropout is {dropout}", "Give a probability.")
        if dropout and num_layers == 1:
            warnings.warn("dropout acts between layers, and there is one layer only.", UserWarning, stacklevel=3)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self._configure(
            bias=bias,
            gain_ih_init=gain_ih_init,
            gain_hh_init=gain_hh_init,
            recurrent_dropout=recurrent_dropout,
            variances=variances,
            unit_rows=unit_rows,
            open_bias=open_bias,
        )
        for layer, suffixes in enumerate(self.suffixes()):
            size = self._state_size() * len(suffixes) if layer else input_size
            for suffix in suffixes:
                self._add_block(suffix, size, hidden_size, self._state_size(), device=device, dtype=dtype)
        self._fix()
        self.reset_parameters()

    def suffixes(self) -> list[list[str]]:
        """What the names of parameters end with, of every layer those of its directions.

        >>> from normprop.nn import GRU
        >>> GRU(3, 4, num_layers=2, bidirectional=True).suffixes()
        [['_l0', '_l0_reverse'], ['_l1', '_l1_reverse']]
        """
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [[f"_l{layer}{end}" for end in ends] for layer in range(self.num_layers)]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """torch's parameters, of every layer and direction, as `torch.nn.RNN` lists them."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        found = [[self._maybe(name, suffix) for name in names] for suffixes in self.suffixes() for suffix in suffixes]
        return [[parameter for parameter in layer if parameter is not None] for layer in found]

    def flatten_parameters(self) -> None:
        """Nothing: weights are computed in every forward. For code that calls it on torch's layers."""

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults, after the sizes."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [f"proj_size={self.proj_size}"] if self.proj_size else []
        parts += [f"num_layers={self.num_layers}"] if self.num_layers > 1 else []
        parts += ["bias=False"] if not self.bias else []
        parts += ["batch_first=True"] if self.batch_first else []
        parts += [f"dropout={self.dropout}"] if self.dropout else []
        parts += ["bidirectional=True"] if self.bidirectional else []
        return ", ".join(parts + self._options())

    def _run(self, input: Tensor | PackedSequence, states: States | None) -> tuple[Any, States]:
        """All layers over all times; states are `(num_layers · directions, N, …)` each, or without N."""
        if isinstance(input, PackedSequence):
            return self._run_packed(input, states)
        self._check(input, input.shape, (2, 3))
        batched = input.ndim == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        if states is not None and not batched:
            states = tuple(state.unsqueeze(1) for state in states)
        states = self._begin(x, x.shape[1], states, batched)
        for layer, suffixes in enumerate(self.suffixes()):
            x = self._between(x, layer)
            parts = [(suffix, self._of(states, layer, k), bool(k)) for k, suffix in enumerate(suffixes)]
            found = [self._padded(x, *part) for part in parts]
            x, states = self._joined(found, states, layer)
        if not batched:
            return x.squeeze(1), tuple(state.squeeze(1) for state in states)
        return x.transpose(0, 1) if self.batch_first else x, states

    def _run_packed(self, input: PackedSequence, states: States | None) -> tuple[PackedSequence, States]:
        x, sizes, order, back = input
        self._check(x, x.shape, (2,))
        counts = sizes.tolist()
        states = self._begin(x, counts[0], states, True)
        states = states if order is None else tuple(state.index_select(1, order) for state in states)
        for layer, suffixes in enumerate(self.suffixes()):
            x = self._between(x, layer)
            found = [
                self._packed(x, counts, suffix, self._of(states, layer, k), bool(k)) for k, suffix in enumerate(suffixes)
            ]
            x, states = self._joined(found, states, layer)
        states = states if back is None else tuple(state.index_select(1, back) for state in states)
        return PackedSequence(x, sizes, order, back), states

    def _padded(self, x: Tensor, suffix: str, state: States, reverse: bool) -> tuple[Tensor, States]:
        """One layer in one direction over `(L, N, features)`."""
        block = self._block(suffix)
        drive = block.drive(x.flip(0) if reverse else x, both=self._both_biases)
        y, state = self._sequence(drive, (block.raw(state[0]), *state[1:]), block)
        h = block.normalized(y)
        return h.flip(0) if reverse else h, (block.normalized(state[0]), *state[1:])

    def _packed(self, x: Tensor, counts: Sequence[int], suffix: str, state: States, reverse: bool) -> tuple[Tensor, States]:
        """One layer in one direction over packed sequences."""
        block = self._block(suffix)
        drives = block.drive(x, both=self._both_biases).split(list(counts))
        y, state = self._unrolled(drives, (block.raw(state[0]), *state[1:]), block, reverse)
        return block.normalized(torch.cat(y)), (block.normalized(state[0]), *state[1:])

    def _sequence(self, drive: Tensor, state: States, block: Block) -> tuple[Tensor, States]:
        """y at all times and the last state for what the input contributes, `(L, N, gates · hidden_size)`."""
        outputs, state = self._unrolled(drive.unbind(0), state, block, False)
        return torch.stack(outputs) if outputs else drive.new_zeros(0, drive.shape[1], self._state_size()), state

    def _unrolled(self, drives: Sequence[Tensor], state: States, block: Block, reverse: bool) -> tuple[list[Tensor], States]:
        keep, training = self.recurrent_dropout, self.training
        return unroll(self._step, drives, state, block, reverse=reverse, keep=keep, training=training)

    def _between(self, x: Tensor, layer: int) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if layer and self.dropout else x

    def _of(self, states: States, layer: int, direction: int) -> States:
        return tuple(state[layer * (1 + self.bidirectional) + direction] for state in states)

    def _joined(self, found: list[tuple[Tensor, States]], states: States, layer: int) -> tuple[Tensor, States]:
        """The outputs of both directions side by side, and the states with those of this layer in their places."""
        outputs = [y for y, _ in found]
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        first = layer * len(found)
        new = (torch.stack(parts) for parts in zip(*(state for _, state in found), strict=True))
        places = zip(states, new, strict=True)
        return x, tuple(torch.cat([old[:first], part, old[first + len(found) :]]) for old, part in places)

    def _begin(self, x: Tensor, count: int, states: States | None, batched: bool) -> States:
        """The initial states, zero where there are none."""
        sizes = (self._state_size(), self.hidden_size)[: self._states]
        stacked = self.num_layers * (1 + self.bidirectional)
        if states is None:
            return tuple(x.new_zeros(stacked, count, size) for size in sizes)
        for state, size in zip(states, sizes, strict=True):
            if state.shape != (stacked, count, size):
                shape = tuple(state.shape) if batched else (state.shape[0], *state.shape[2:])
                fits = (stacked, count, size) if batched else (stacked, size)
                self._refuse(f"an initial state has shape {shape}", f"Give it shape {fits}.")
        return states

    def _check(self, input: Tensor, shape: Sequence[int], dims: tuple[int, ...]) -> None:
        if not input.is_floating_point() or len(shape) not in dims or shape[-1] != self.input_size:
            self._refuse(
                f"the input is {tuple(shape)}, {input.dtype}",
                f"Give a real sequence of two or three dimensions, the last of size {self.input_size}.",
            )

    def _state_size(self) -> int:
        return self.proj_size or self.hidden_size
