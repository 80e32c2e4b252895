"""Write the map of the literature, docs/lineage.html, from docs/lineage/lineage.json: `python docs/lineage/build.py`.

An entry has a title, authors and a year; `relation` says whether it "cites" the paper or is "cited" by it; `adds` is a
sentence on what it adds, `arxiv` its number, `api` what of normprop implements it or compares with it.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from normprop.inspection.viewer import assembled, embedded, libraries, part

HERE = Path(__file__).parent
TARGET = HERE.parent / "lineage.html"
# Where each place in normprop is described, on the site that these pages make.
_RELATIONS = {"root": "the paper", "cites": "cites it", "cited": "is cited by it"}
_PAGES = {"normprop compare": "compare/", "normprop reproduce": "paper/"}


def papers() -> list[dict[str, Any]]:
    """The paper and those around it, with ids and the pages that `api` leads to."""
    data = json.loads((HERE / "lineage.json").read_text(encoding="utf-8"))
    entries = [data["root"] | {"relation": "root"}, *data["papers"]]
    return [
        entry | {"id": f"p{i}"} | ({"page": _page(entry["api"])} if "api" in entry else {})
        for i, entry in enumerate(entries)
    ]


def _page(api: str) -> str:
    command = next((page for name, page in _PAGES.items() if api.startswith(name)), None)
    return command or f"reference/#{api}"


def page() -> str:
    """The page."""
    entries = papers()
    lines = [
        f'<li data-place="{i}">{escape(p["title"])} ({escape(", ".join(p["authors"][:3]) or "unknown")}'
        f"{' et al.' if len(p['authors']) > 3 else ''}, {p['year'] or 'year unknown'}): "
        f"{_RELATIONS[p['relation']]}.</li>"
        for i, p in enumerate(entries)
    ]
    parts = {
        "style": part("viewer.css"),
        "count": str(len(entries)),
        "list": "\n".join(lines),
        "data": embedded({"papers": entries}),
        "libraries": libraries(),
        "graph": part("graph.js"),
        "page": (HERE / "lineage.js").read_text(encoding="utf-8"),
    }
    return assembled((HERE / "lineage.page.html").read_text(encoding="utf-8"), parts)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
