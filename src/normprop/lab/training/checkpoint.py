"""The training checkpoint."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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
