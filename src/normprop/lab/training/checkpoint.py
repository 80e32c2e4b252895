"""The training checkpoint."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normprop.errors import NormPropError
from normprop.lab.whole_file import write_whole

_FORMAT = "normprop training checkpoint 2"


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
        NormPropError: when it is missing, truncated, changed since it was written, or not a checkpoint of this kind.
    """
    if not path.is_file():
        raise NormPropError(f"There is no checkpoint {path}.\nLeave out --resume to start the run.")
    try:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as archive:
            damaged = archive.testzip()  # torch itself compares no checksums
        if damaged is not None:
            raise zipfile.BadZipFile(damaged)
        content.seek(0)
        state: Any = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have their own way to say "damaged"
        raise NormPropError(
            f"{path} is truncated, damaged or no checkpoint.\nRestore it from a copy, or start again with --overwrite."
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise NormPropError(
            f"{path} wasn't written by normprop train of this version.\n"
            "Choose the --out folder of such a run, or another one to start."
        )
    return state


def check_alike(found: Any, expected: Any, what: str) -> None:
    """Make sure that something from a file is built as what stands here in its place.

    Numbers may be any numbers, lists of any length; a tensor has shape and dtype of the other.

    Raises:
        ValueError: naming what differs.
    """
    if isinstance(expected, Tensor):
        alike = isinstance(found, Tensor) and found.shape == expected.shape and found.dtype == expected.dtype
    elif isinstance(expected, Mapping):
        alike = isinstance(found, Mapping) and found.keys() == expected.keys()
        for key in expected if alike else ():
            check_alike(found[key], expected[key], f"{what} {key}")
    elif isinstance(expected, list | tuple):
        alike = isinstance(found, type(expected))
        for one in found if alike and expected else ():
            check_alike(one, expected[0], what)
    elif type(expected) in (int, float):
        alike = type(found) in (int, float) if type(expected) is float else type(found) is int
    else:
        alike = expected is None or isinstance(found, type(expected))
    if not alike:
        raise ValueError(f"{what} isn't what it was")
