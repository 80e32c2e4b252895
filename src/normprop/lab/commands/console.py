"""Where commands print: the terminal as wide as it is, anything else wide enough for a table."""

from __future__ import annotations

import sys

from rich.console import Console

_PIPE_WIDTH = 120


def console() -> Console:
    """The standard output for tables and progress; a pipe or file gets plain text that isn't cut off at 80 columns."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def percent(share: float | None) -> str:
    """A share as text.

    Example:
        >>> percent(0.9117), percent(None)
        ('91.2 %', '–')
    """
    return "–" if share is None else f"{100 * share:.1f} %"
