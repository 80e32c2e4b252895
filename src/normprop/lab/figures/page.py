"""One HTML file with a table and figures in it, which needs nothing else to be read."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
td:nth-child(2), th:nth-child(2) { text-align: left; }
img { max-width: 100%; }
div { overflow-x: auto; }
"""


def html_page(
    title: str, notes: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]], figures: Mapping[str, bytes]
) -> str:
    """A page of notes, a table and PNG figures.

    Args:
        title: In a line.
        notes: A paragraph each.
        columns: Headings of the table.
        rows: Its cells, as many in each row.
        figures: A caption and a PNG image each.

    Example:
        >>> page = html_page("a < b", ["A note."], ["x"], [["1 & 2"]], {"A figure.": b"png"})
        >>> "<h1>a &lt; b</h1>" in page, "<td>1 &amp; 2</td>" in page, "base64,cG5n" in page
        (True, True, True)
    """
    paragraphs = "".join(f"<p>{escape(note)}</p>\n" for note in notes)
    images = "".join(
        f'<h2>{escape(caption)}</h2>\n<img alt="{escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}">\n'
        for caption, image in figures.items()
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{paragraphs}"
        f"<div><table>\n<thead>{_row(columns, 'th')}</thead>\n<tbody>\n{''.join(_row(row, 'td') for row in rows)}"
        f"</tbody>\n</table></div>\n{images}</body>\n</html>\n"
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"
