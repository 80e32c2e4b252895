"""Several forwards of one network that wait for each other, so that something can be done about all of them at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from normprop.errors import NormPropError


class LockStep:
    """Runs functions side by side, and one action for all of them wherever they meet.

    Args:
        count: of the functions.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.local = threading.local()
        self.met = threading.Condition()
        self.slots: dict[int, tuple[Any, Any]] = {}
        self.ended = 0
        self.failure: BaseException | None = None

    def run(self, functions: Sequence[Callable[[], Any]]) -> None:
        """Run all functions to their ends, without gradients.

        Raises:
            BaseException: whatever one of them, or an action, raised first.
        """
        if self.count == 1:
            functions[0]()
            return
        self.slots, self.ended, self.failure = {}, 0, None
        threads = [threading.Thread(target=self._work, args=(i, f)) for i, f in enumerate(functions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def meet(self, place: Any, value: Any, action: Callable[[Sequence[Any]], None]) -> None:
        """Wait until all functions have come to a place, and have the action done once with what each brought.

        Raises:
            NormPropError: functions came to different places.
        """
        if self.count == 1:
            action([value])
            return
        with self.met:
            mine = self.slots
            mine[self.local.index] = place, value
            if len(mine) + self.ended == self.count:
                self._act(action)
                self.slots = {}
                self.met.notify_all()
            while self.slots is mine and self.failure is None:
                self.met.wait()
            if self.failure is not None:
                raise _StoppedError

    def _act(self, action: Callable[[Sequence[Any]], None]) -> None:
        try:
            places = [place for place, _ in self.slots.values()]
            if self.ended or any(place is not places[0] for place in places):
                raise NormPropError(
                    "the batches take different paths through the network.\nPass batches that take the same."
                )
            with torch.no_grad():
                action([self.slots[i][1] for i in range(self.count)])
        except BaseException as error:
            self.failure = self.failure or error

    @torch.no_grad()
    def _work(self, index: int, function: Callable[[], Any]) -> None:
        self.local.index = index
        failure: BaseException | None = None
        try:
            function()
        except _StoppedError:
            pass
        except BaseException as error:
            failure = error
        with self.met:
            self.ended += 1
            self.failure = self.failure or failure
            if self.slots and len(self.slots) + self.ended == self.count:
                self._act(lambda _: None)
            self.met.notify_all()


class _StoppedError(Exception):
    """Another function has failed."""
