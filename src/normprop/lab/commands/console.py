"""How commands print: to a terminal as wide as it is, to anything else in lines wide enough for a table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table as TerminalTable

from normprop.lab.pages.text_table import Table

_PIPE_WIDTH = 120


def console() -> Console:
    """The standard output for tables and progress; a pipe or file gets plain text that isn't cut off at 80 columns."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def on_screen(table: Table) -> TerminalTable:
    """The table as rich draws it, without its note.

    Example:
        >>> on_screen(Table(["x"], [["1"]], "Numbers")).row_count
        1
    """
    drawn = TerminalTable(title=escape(table.title), title_justify="left")
    for column, side in zip(table.columns, table.alignment(), strict=True):
        drawn.add_column(escape(column), justify=side)
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    return drawn


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Give the user who interrupts this block some advice on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(advice) from None


def percent(share: float | None) -> str:
    """A share as text.

    Example:
        >>> percent(0.9117), percent(None)
        ('91.2 %', '–')
    """
    return "–" if share is None else f"{100 * share:.1f} %"
