"""Doctests in docstrings are code, whatever their section is called."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_BARE = re.compile(r"^(>>> .*(?:\n.+)*)", re.MULTILINE)


class Examples(Extension):
    """Reads a section "Example" as "Examples", which the parser of docstrings knows, and fences doctests outside of one."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change a docstring."""
        if obj.docstring is not None:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = _BARE.sub(r"```pycon\n\1\n```", text)
