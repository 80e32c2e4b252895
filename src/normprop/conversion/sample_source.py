"""Where samples to measure come from: a few at a time, the same again for the same number, and no random state touched."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normprop.conversion.calibration import samples
from normprop.errors import NormPropError
from normprop.graph.example_inputs import Inputs, batch_inputs

# How many times the samples of one draw are taken from a loader, once: draws choose among them.
_POOL = 4


class SampleSource:
    """Draws of a few samples each.

    Args:
        data: a tensor of samples ``(N, …)``; a loader or other iterable of batches, as `calibrate` takes them, of which the
            first few are read now and kept; or a function of the number of the draw, which gives either, wholly used.
        example: what the network takes.
        model: the network.
        count: samples a draw.
        seed: of the choice.

    Raises:
        NormPropError: nothing to draw from.
    """

    def __init__(self, data: Any, example: Inputs, model: nn.Module, *, count: int, seed: int) -> None:
        self.example, self.model, self.count, self.seed = example, model, count, seed
        self.function: Callable[[int], Any] | None = None
        self.whole: Inputs | None = None
        self.pool: list[Inputs] = []
        if isinstance(data, Tensor | Inputs):
            self.whole = batch_inputs(data, example, model)
        elif isinstance(data, Iterable):
            with _own_randomness(data, seed):
                self.pool = self._first(data)
        elif callable(data):
            self.function = data
        else:
            raise NormPropError(
                f"samples are measured, and {type(data).__name__} holds none.\n"
                "Pass a tensor, a loader, or a function that returns one of them for the number of a step."
            )
        if self.function is None and not (self.pool if self.whole is None else _size(self.whole)):
            raise NormPropError("there is no data to measure.\nPass a tensor, or a loader that yields some.")

    def draw(self, number: int) -> list[Inputs]:
        """The samples of one draw in batches, on the network's device.

        Raises:
            NormPropError, NotFiniteError: no data, or values that are not finite.
        """
        device = next(self.model.parameters()).device
        if self.function is not None:
            with _own_randomness(None, self.seed + number):
                given = self.function(number)
            return samples(given, device, self.example, self.model)
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        if self.whole is not None:
            rows = torch.randperm(_size(self.whole), generator=generator)[: self.count]
            drawn = self.whole.map(lambda t: t[rows.to(t.device)])
            return samples(drawn, device, self.example, self.model)
        order = torch.randperm(len(self.pool), generator=generator).tolist()
        chosen, found = list[Inputs](), 0
        for index in order:
            if found >= self.count:
                break
            chosen.append(self.pool[index])
            found += _size(self.pool[index])
        return samples(list(_together(chosen)), device, self.example, self.model)

    def _first(self, data: Iterable[Any]) -> list[Inputs]:
        found, size = list[Inputs](), 0
        for batch in data:
            parts = list(_each(batch_inputs(batch, self.example, self.model)))
            found += parts
            size += sum(map(_size, parts))
            if size >= _POOL * self.count:
                break
        return found


def _each(batch: Inputs) -> Iterator[Inputs]:
    """Samples one by one where all tensors hold as many, else the batch as it is."""
    sizes = {len(t) if t.dim() else 0 for t in batch.tensors()}
    if len(sizes) != 1 or sizes == {0} or any(isinstance(a, list | tuple | dict) for a in batch.args):
        yield batch
        return
    for i in range(sizes.pop()):
        yield batch.map(lambda t, i=i: t[i : i + 1])


def _size(batch: Inputs) -> int:
    tensors = [t for t in batch.tensors() if t.dim()]
    return len(tensors[0]) if tensors else 1


def _together(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """Batches of one shape as one."""
    groups: dict[Any, list[Inputs]] = {}
    for batch in batches:
        tensors = batch.tensors()
        alike = all(t.dim() for t in tensors) and len({len(t) for t in tensors}) == 1
        shape = tuple((t.shape[1:], t.dtype) for t in tensors) if alike else id(batch)
        groups.setdefault(shape, []).append(batch)
    for group in groups.values():
        parts = [iter(batch.tensors()) for batch in group]
        yield group[0] if len(group) == 1 else group[0].map(lambda _, parts=parts: torch.cat([next(p) for p in parts]))


@contextlib.contextmanager
def _own_randomness(loader: Any, seed: int) -> Iterator[None]:
    """Random numbers that depend on a seed alone, and nobody else's: torch's, Python's, NumPy's, and a loader's own."""
    numpy: Any = sys.modules.get("numpy")
    python, numbers = random.getstate(), numpy.random.get_state() if numpy else None
    owners = (loader, getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    found = (torch.default_generator, *(getattr(owner, "generator", None) for owner in owners))
    own = {id(g): g for g in found if isinstance(g, torch.Generator)}
    states = [generator.get_state() for generator in own.values()]
    try:
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % (1 << 32))
        for generator in own.values():
            generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(numbers)
        for generator, state in zip(own.values(), states, strict=True):
            generator.set_state(state)
