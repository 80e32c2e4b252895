"""A text as streams that are read side by side, window by window."""

from __future__ import annotations

import math

from torch import Tensor

from normprop.errors import NormPropError


class Streams:
    """`count` pieces of a text of equal length, each read from its start to its end, all at once and `window` characters a
    time; after the end they start again.

    A recurrent network keeps its state from one window to the next of the same pass: that is truncated backpropagation
    through time. Each pass begins at another character, fixed by its number, so that windows aren't always the same.

    Args:
        text: Characters `(n,)`.
        count: How many streams.
        window: Characters a time.

    Raises:
        NormPropError: The text is too short for one window of each stream and its successors.

    Example:
        >>> import torch
        >>> streams = Streams(torch.arange(20), count=2, window=3)
        >>> x, y = streams.window(1)
        >>> x.tolist(), y[-1].tolist(), streams.passed, streams.begins(1), streams.begins(streams.passed)
        ([[3, 13], [4, 14], [5, 15]], [6, 16], 2, False, True)
    """

    def __init__(self, text: Tensor, *, count: int, window: int) -> None:
        length = len(text) // count
        # The last character of a stream has no successor in it, and a pass may begin up to a window later.
        self.passed = (length - window) // window
        if self.passed < 1:
            raise NormPropError(
                f"{len(text)} characters don't give {count} streams a window of {window}.\n"
                "Use a longer text, a smaller --batch-size or a smaller --window."
            )
        self.size = window
        self._streams = text[: count * length].view(count, length).t().contiguous()

    def begins(self, step: int) -> bool:
        """Whether the window of this step is the first one of a pass."""
        return step % self.passed == 0

    def window(self, step: int) -> tuple[Tensor, Tensor]:
        """Characters and their successors, `(window, count)` each, at a step of training, from 0 on."""
        round_, place = divmod(step, self.passed)
        start = (round_ * 37) % self.size + place * self.size
        part = self._streams[start : start + self.size + 1]
        return part[:-1], part[1:]


def rows(text: Tensor, count: int, window: int) -> list[tuple[Tensor, Tensor]]:
    """All of a text once, for evaluation: windows of characters and successors `(≤ window, count)`.

    Example:
        >>> import torch
        >>> [tuple(x.shape) for x, _ in rows(torch.arange(23), 2, 4)]
        [(4, 2), (4, 2), (2, 2)]
    """
    count = max(1, min(count, len(text) // 2))
    length = len(text) // count
    streams = text[: count * length].view(count, length).t()
    starts = range(0, length - 1, window)
    return [(streams[s : min(s + window, length - 1)], streams[s + 1 : min(s + window, length - 1) + 1]) for s in starts]


def bits(nats: float) -> float:
    """Nats as bits.

    Example:
        >>> bits(math.log(8))
        3.0
    """
    return nats / math.log(2)
