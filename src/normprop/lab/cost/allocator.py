"""An allocator that keeps freed memory, so that no step pays for pages that another one gave back."""

from __future__ import annotations

import ctypes

# <malloc.h> of glibc.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to return nothing to the system from now on; True if there is such an allocator.

    By default it returns large blocks, and a step that asks for them again pays for some thousand page faults. How many
    depends on what ran before, which can change the time of a step by a tenth and more. An allocator that keeps its memory,
    as CUDA's does, causes none.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # Windows, macOS, musl
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
