"""Work that several processes share, each piece done by one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Claim what a lock file stands for, for the time of the block: True, or False if another process holds it.

    Args:
        path: of the file, which is made with its folder; the claim of a process that ends is free again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
