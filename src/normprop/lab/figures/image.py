"""A figure as the content of a file."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


def image(figure: Figure, kind: str = "png") -> bytes:
    """The figure in a format that matplotlib knows: png, svg, pdf."""
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    return content.getvalue()
