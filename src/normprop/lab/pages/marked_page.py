"""A page in which generated blocks stand between marks, and everything else is its author's."""

from __future__ import annotations

import re
from collections.abc import Mapping


def filled(page: str, blocks: Mapping[str, str]) -> str:
    """The page with new text between the marks of each block, `<!-- NAME -->` and `<!-- end -->`.

    What stands elsewhere stays; a block that the page lacks is appended.

    Example:
        >>> print(filled("By hand.\\n\\n<!-- a -->old<!-- end -->\\n", {"a": "new"}))
        By hand.
        <BLANKLINE>
        <!-- a -->
        <BLANKLINE>
        new
        <BLANKLINE>
        <!-- end -->
        <BLANKLINE>
    """
    for name, text in blocks.items():
        new = marked(name, text)
        found = re.search(rf"<!-- {re.escape(name)} -->.*?<!-- end -->", page, re.DOTALL)
        page = page[: found.start()] + new + page[found.end() :] if found else f"{page.rstrip()}\n\n{new}\n"
    return page


def marked(name: str, text: str) -> str:
    """A block between its marks."""
    return f"<!-- {name} -->\n\n{text}\n\n<!-- end -->"
