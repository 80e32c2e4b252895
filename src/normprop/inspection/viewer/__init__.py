"""The parts of an interactive page: styles, scripts, and the graph library with its licence."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

_LIBRARIES = {
    "cytoscape": ("cytoscape.LICENSE",),
    "cytoscape-dagre": ("cytoscape-dagre.LICENSE", "dagre.LICENSE"),
}


def part(name: str) -> str:
    """A file of this folder as text."""
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def libraries() -> str:
    """The graph libraries, minified, under their licences."""
    scripts = []
    for name, licences in _LIBRARIES.items():
        text = "\n".join(part(licence) for licence in licences)
        scripts.append(f"/*\n{name}\n\n{text}*/\n" + re.sub(r"//# sourceMappingURL=\S+", "", part(f"{name}.min.js")))
    return "\n".join(scripts)


def assembled(template: str, parts: dict[str, str]) -> str:
    """A page in which ``%name%`` is replaced by the part of that name.

    Args:
        template: the page's text.
        parts: text by name; what is not code must be escaped already.
    """
    return re.sub(r"%(\w+)%", lambda found: parts[found[1]], template)


def embedded(data: Any) -> str:
    """Data as JSON that may stand in a page: nothing in it ends a script."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
