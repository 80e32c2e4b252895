"""Steps of several kinds timed in turns, so that other work on the machine slows all of them alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from normprop.lab.cost.quartiles import Quartiles

Step = Callable[[], object]
Clock = Literal["wall", "cpu"]

LEAST_ROUNDS = 5
_WARM_UP = 2
# The first step of a turn finds the caches full of others' data, which doesn't matter to a step of this length.
_COUNTED_FROM_THE_FIRST = 0.2
_TURN_SECONDS = 0.02
_LONGEST_TURN = 100


@dataclass(frozen=True)
class Rounds:
    """Seconds per step: `wall[name][round]` is wall-clock time, `cpu[name][round]` is summed over processors."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]

    def seconds(self, name: str, clock: Clock = "wall") -> Quartiles:
        """The seconds of one step.

        Example:
            >>> Rounds({"a": [2.0, 2.0], "b": [1.0, 4.0]}, {}).seconds("a").median
            2.0
        """
        return Quartiles.of(self._clock(clock)[name])

    def ratio(self, name: str, to: str, clock: Clock = "wall") -> Quartiles:
        """The ratio of one step's time to another's in the same round.

        Example:
            >>> Rounds({"a": [2.0, 2.0], "b": [1.0, 4.0]}, {}).ratio("a", "b").median
            1.25
        """
        times = self._clock(clock)
        return Quartiles.of([a / b for a, b in zip(times[name], times[to], strict=True)])

    def __len__(self) -> int:
        return len(next(iter(self.wall.values()), []))

    def _clock(self, clock: Clock) -> dict[str, list[float]]:
        return self.wall if clock == "wall" else self.cpu


def measure(
    steps: Mapping[str, Step], *, seconds: float, device: torch.device | str = "cpu", least: int = LEAST_ROUNDS
) -> Rounds:
    """Time every step in every round, each round beginning with another one.

    Each step is warmed up first. A turn lasts at least 20 ms: a shorter step is repeated. If steps are shorter than 0.2 s,
    a turn begins with one that isn't counted. Python collects garbage only between rounds.

    Args:
        steps: The steps by name; one call is one step.
        seconds: Time after which no more rounds are added.
        device: The device to wait for before a clock is read.
        least: The least number of rounds, whatever they take.

    Example:
        >>> len(measure({"nothing": lambda: None}, seconds=0, least=3))
        3
    """
    wait = _waiting(torch.device(device))
    turns = {name: _turn_of(step, wait) for name, step in steps.items()}
    rounds = Rounds({name: [] for name in steps}, {name: [] for name in steps})
    with _garbage_kept():
        end = time.perf_counter() + seconds
        while len(rounds) < least or time.perf_counter() < end:
            gc.collect()
            for name in _rotated(list(steps), len(rounds)):
                wall, cpu = turns[name].run()
                rounds.wall[name].append(round(wall, 9))  # no clock is finer
                rounds.cpu[name].append(round(cpu, 9))
    return rounds


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Collect garbage on request only, and of new objects only, which takes no time."""
    collecting = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()


def _rotated(names: Sequence[str], by: int) -> list[str]:
    by %= max(1, len(names))
    return [*names[by:], *names[:by]]


@dataclass(frozen=True)
class _Turn:
    """Steps in a row, of which the first ones aren't counted."""

    step: Step
    uncounted: int
    counted: int
    wait: Callable[[], None]

    def run(self) -> tuple[float, float]:
        """Wall-clock and processor seconds of one step."""
        for _ in range(self.uncounted):
            self.step()
        self.wait()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.counted):
            self.step()
        self.wait()
        return (time.perf_counter() - wall) / self.counted, (time.process_time() - cpu) / self.counted


def _turn_of(step: Step, wait: Callable[[], None]) -> _Turn:
    """A turn of the right length; the step is warm afterwards."""
    once, _ = _Turn(step, _WARM_UP, 1, wait).run()
    counted = min(_LONGEST_TURN, max(1, math.ceil(_TURN_SECONDS / max(once, 1e-9))))
    return _Turn(step, int(once < _COUNTED_FROM_THE_FIRST), counted, wait)


def _waiting(device: torch.device) -> Callable[[], None]:
    """A function that returns when the device has done all its work."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
