"""The error for an unknown name, which offers the nearest known ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from normprop.errors import NormPropError

# timm knows a thousand models.
_SHOWN = 20


def unknown(kind: str, name: str, known: Iterable[str], otherwise: str = "") -> NormPropError:
    """An error to raise: the unknown name, then the nearest known names or all of them.

    Example:
        >>> print(unknown("model", "resnet2O", ["nin", "resnet20"]))
        Unknown model 'resnet2O'.
        Did you mean resnet20?
    """
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    some = ", ".join(known[:_SHOWN]) + (", …" if len(known) > _SHOWN else "")
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"Choose one of {some}."
    return NormPropError(f"Unknown {kind} {name!r}.\n{remedy} {otherwise}".rstrip())
