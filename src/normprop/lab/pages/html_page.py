"""One HTML file with a table and figures in it, which needs nothing else to be read."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader

from normprop.lab.pages.text_table import Table

_TEMPLATES = Environment(
    loader=PackageLoader("normprop.lab.pages", ""), autoescape=True, trim_blocks=True, keep_trailing_newline=True
)


def html_page(table: Table, notes: Sequence[str], figures: Mapping[str, bytes]) -> str:
    """A page of notes, a table and PNG figures.

    Args:
        table: Its title is the page's.
        notes: A paragraph each.
        figures: A caption and a PNG image each.

    Example:
        >>> page = html_page(Table(["x"], [["1 & 2"]], "a < b"), ["A note."], {"A figure.": b"png"})
        >>> "<h1>a &lt; b</h1>" in page, '<td class="left">1 &amp; 2</td>' in page, "base64,cG5n" in page
        (True, True, True)
    """
    images = {caption: base64.b64encode(image).decode() for caption, image in figures.items()}
    page = _TEMPLATES.get_template("page.html.jinja")
    return page.render(table=table, sides=table.alignment(), notes=notes, figures=images)
