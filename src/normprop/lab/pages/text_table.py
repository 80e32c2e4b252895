"""A table of text, for a page or a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from tabulate import tabulate


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        columns: Headings.
        rows: Cells, one for each column.
        title: What the table shows, in a line.
        note: How to read it.
        words: Places of the columns that hold words and are aligned left; numbers are aligned right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    words: Collection[int] = (0,)

    def alignment(self) -> list[Literal["left", "right"]]:
        """The side of each column."""
        return ["left" if place in self.words else "right" for place in range(len(self.columns))]

    def markdown(self) -> str:
        """The title in bold, the table and the note, as far as there are any.

        Example:
            >>> print(Table(("x", "x²"), [("two", "4")], "Squares").markdown())
            **Squares**
            <BLANKLINE>
            | x   |   x² |
            |:----|-----:|
            | two |    4 |
        """
        body = tabulate(self.rows, self.columns, "pipe", colalign=self.alignment(), disable_numparse=True)
        return "\n\n".join(part for part in (self.title and f"**{self.title}**", body, self.note) if part)
