"""Where a probe's numbers go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from normprop.errors import NormPropError


class Writer(Protocol):
    """Takes the numbers of one look after the other."""

    def write(self, numbers: Mapping[str, float]) -> None:
        """Take a flat dictionary, ``step`` among it."""

    def close(self) -> None:
        """There will be no more."""


def writers_for(log: Any) -> list[Writer]:
    """The writers of a path, an object with ``add_scalar``, a callable, None, or a list of these.

    Raises:
        NormPropError: it is none of them, or a file that cannot be opened.
    """
    if log is None:
        return []
    if isinstance(log, Sequence) and not isinstance(log, str):
        return [writer for one in log for writer in writers_for(one)]
    if isinstance(log, str | Path):
        return [JsonLines(Path(log))]
    if hasattr(log, "add_scalar"):
        return [TensorBoard(log)]
    if callable(log):
        return [Callback(log)]
    raise NormPropError(f"log is a {type(log).__name__}.\nPass a path, a SummaryWriter, a callable, or a list of these.")


class JsonLines:
    """A file that gets a line of JSON for every look, written at once.

    Args:
        path: of the file; what stands in it stays.

    Raises:
        NormPropError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise NormPropError(f"{path} cannot be written: {error}.\nName a file in a folder that exists.") from error

    def write(self, numbers: Mapping[str, float]) -> None:
        """Append a line; what is not finite becomes null."""
        self.file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in numbers.items()}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard:
    """A SummaryWriter, or whatever else has ``add_scalar(tag, value, step)``; it stays open.

    Args:
        summary: the writer.
    """

    def __init__(self, summary: Any) -> None:
        self.summary = summary

    def write(self, numbers: Mapping[str, float]) -> None:
        """Add a scalar for every number."""
        for key, value in numbers.items():
            if key != "step":
                self.summary.add_scalar(key, value, int(numbers["step"]))

    def close(self) -> None:
        """Nothing: whoever opened it closes it."""


class Callback:
    """A callable that takes the dictionary, such as ``wandb.log``.

    Args:
        function: the callable.
    """

    def __init__(self, function: Callable[[dict[str, float]], object]) -> None:
        self.function = function

    def write(self, numbers: Mapping[str, float]) -> None:
        """Call it."""
        self.function(dict(numbers))

    def close(self) -> None:
        """Nothing."""
