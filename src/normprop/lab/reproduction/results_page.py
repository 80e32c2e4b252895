"""A page of Markdown in which generated blocks stand between marks, and everything else is its author's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from normprop.lab.reproduction.experiment_tables import HEADINGS, Table

SETTING, UNFINISHED = "setting", "not-run"

_SKELETON = "# The paper's experiments\n\n{setting}\n\n{sections}\n\n## What was not run\n\n{unfinished}\n"


def markdown(table: Table) -> str:
    """The table and how to read it.

    Example:
        >>> print(markdown(Table(("a", "b"), [["1", "2"]], "A note.")))
        | a | b |
        |---|---:|
        | 1 | 2 |
        <BLANKLINE>
        A note.
    """
    lines = [_line(table.heads), "|---" + "|---:" * (len(table.heads) - 1) + "|", *map(_line, table.rows)]
    return "\n".join(lines) + f"\n\n{table.reading}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def skeleton() -> str:
    """An empty page with a heading and a pair of marks for each experiment."""
    sections = "\n\n".join(f"## {heading}\n\n{_marked(part, '')}" for part, heading in HEADINGS.items())
    return _SKELETON.format(setting=_marked(SETTING, ""), sections=sections, unfinished=_marked(UNFINISHED, ""))


def filled(page: str, blocks: Mapping[str, str]) -> str:
    """The page with new text between the marks of each block; what stands elsewhere stays, a missing block is appended.

    Example:
        >>> print(filled("By hand.\\n\\n<!-- normprop reproduce: a -->\\nold\\n<!-- end: a -->\\n", {"a": "new"}))
        By hand.
        <BLANKLINE>
        <!-- normprop reproduce: a -->
        <BLANKLINE>
        new
        <BLANKLINE>
        <!-- end: a -->
        <BLANKLINE>
    """
    for name, text in blocks.items():
        marked = _marked(name, text)
        before, opening, rest = page.partition(_opening(name))
        _, closing, after = rest.partition(_closing(name))
        page = f"{before}{marked}{after}" if opening and closing else f"{page.rstrip()}\n\n{marked}\n"
    return page


def _marked(name: str, text: str) -> str:
    return f"{_opening(name)}\n\n{text}\n\n{_closing(name)}"


def _opening(name: str) -> str:
    return f"<!-- normprop reproduce: {name} -->"


def _closing(name: str) -> str:
    return f"<!-- end: {name} -->"
