"""Mean ± standard deviation as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], *, digits: int = 1) -> str:
    """Mean ± standard deviation; the mean alone of one value, a dash of none.

    Example:
        >>> spread([70.0, 72.0]), spread([70.0]), spread([])
        ('71.0 ± 1.4', '70.0', '–')
    """
    if not values:
        return "–"
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"
