"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from normprop.errors import NormPropError


def check_folder(path: Path) -> None:
    """Make sure that results can be written to a folder, which need not be there yet.

    Raises:
        NormPropError: it is a file or below one, or can't be written to.
    """
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return
    reason = "can't be written to" if there.is_dir() else "is a file"
    raise NormPropError(f"Results can't be put into {path}: {there} {reason}.\nChoose another --out.")


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path` such that a reader, or a crash at any moment, finds either the old file or the new.

    Raises:
        NormPropError: when the disk is full or the folder can't be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # or the rename itself may not survive a power failure
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = "The previous version is intact." if path.exists() else "Nothing was left behind."
        raise NormPropError(
            f"{path} couldn't be written: {error.strerror or error}.\n{kept} Free some space or choose another --out."
        ) from error
