"""Files that are written whole or not at all, and the training checkpoint among them."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from normprop.errors import NormPropError

_FORMAT = "normprop training checkpoint 2"


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


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings and containers of them.

    Raises:
        NormPropError: as `write_whole`.
    """
    # Serialised in memory first: torch.save turns a full disk into errors that don't say so.
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, buffer)
    write_whole(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, executing nothing that is in it.

    Raises:
        NormPropError: when it is missing, truncated, or not a checkpoint of this kind.
    """
    if not path.is_file():
        raise NormPropError(f"There is no checkpoint {path}.\nLeave out --resume to start the run.")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have their own way to say "damaged"
        raise NormPropError(
            f"{path} is truncated or no checkpoint.\nRestore it from a copy, or start again with --overwrite."
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise NormPropError(
            f"{path} wasn't written by normprop train of this version.\n"
            "Choose the --out folder of such a run, or another one to start."
        )
    return state
