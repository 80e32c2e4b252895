"""Gradient accumulation: the moment lane once for several backward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from normprop.conversion.entry import Entry, Key
from normprop.conversion.lane import Lane, lanes_in
from normprop.errors import NormPropError
from normprop.sites.reference import Scale


@contextlib.contextmanager
def accumulate(model: nn.Module) -> Iterator[nn.Module]:
    """Run the moment lane once for all forward and backward passes inside the context.

    What the lane computes depends on parameters alone, so micro-batches between two optimiser steps can share it. Their
    gradients with respect to what it computed add up, and go through it once when the context ends: gradients are the same
    as without the context, to rounding, and complete only after it.

    Args:
        model: a converted network, or a module that holds some (a DistributedDataParallel, a Sequential with a
            `Standardize`, …).

    Yields:
        The model.

    Raises:
        NormPropError: nothing in the model is converted, or a parameter was changed inside the context.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> model = normprop.convert(net)
        >>> with normprop.accumulate(model):
        ...     for x in torch.randn(10, 1, 4):
        ...         model(x).square().sum().backward()
        >>> model[0].weight.grad.shape
        torch.Size([8, 4])
    """
    lanes = lanes_in(model)
    if not lanes:
        raise NormPropError(f"accumulate found no converted network in {type(model).__name__}.\nConvert it first.")
    for lane in lanes:
        lane.shared = _Shared(lane)
    shared = [lane.shared for lane in lanes]
    try:
        yield model
    finally:
        for lane in lanes:
            lane.shared = None
    for one in shared:
        one.backward()


class _Shared:
    """Gives every forward the same values of a lane, cut off from it.

    Args:
        lane: the lane.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.versions = self._versions()
        self.values: dict[Key, Scale] = {}
        self.leaves: list[tuple[Tensor, Tensor]] = []

    def __call__(self, root: nn.Module, entries: Sequence[Entry]) -> dict[Key, Scale]:
        if not torch.is_grad_enabled():
            return self.lane.evaluate(root, entries)
        if self.versions != self._versions():
            raise NormPropError(
                "a parameter was changed while micro-batches share what is computed from it.\n"
                "Leave normprop.accumulate before optimizer.step(), and enter it again after."
            )
        missing = [entry for entry in entries if entry.key not in self.values]
        if missing:
            found = self.lane.evaluate(root, missing)
            self.values |= {key: self._cut(scale) for key, scale in found.items()}
        return {entry.key: self.values[entry.key] for entry in entries}

    def _cut(self, scale: Scale) -> Scale:
        weight, factor, offset = map(self._leaf, scale)
        assert offset is not None
        return Scale(weight, factor, offset)

    def _leaf(self, value: Tensor | None) -> Tensor | None:
        """A value of the lane, cut off from it if gradients flow through it."""
        if value is None or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        self.leaves.append((value, leaf))
        return leaf

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.lane.root.parameters()]

    def backward(self) -> None:
        """Send what the passes have left through the lane."""
        pairs = [(value, leaf.grad) for value, leaf in self.leaves if leaf.grad is not None]
        self.leaves.clear()
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])
