"""The structures that the compiled functions read, as C lays them out."""

from __future__ import annotations

import ctypes
from typing import Any

_NUMBER, _REAL, _ADDRESS = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Curve(ctypes.Structure):
    """curves.h's `curve`."""

    _fields_ = [  # as ctypes wants it
        ("kind", _NUMBER), ("panels", _NUMBER), ("a", _REAL), ("b", _REAL), ("c", _REAL),
        ("reach", _REAL), ("bend", _REAL), ("near", _REAL), ("far", _REAL), ("kinked", _NUMBER),
        ("counts", _ADDRESS), ("places", _ADDRESS), ("weights", _ADDRESS), ("knots", _ADDRESS), ("pieces", _ADDRESS),
    ]  # fmt: skip

    def keep(self, field: str, numbers: ctypes.Array[Any]) -> None:
        """Point to some numbers, which live as long as this does."""
        setattr(self, field, ctypes.addressof(numbers))
        setattr(self, f"_{field}", numbers)


class MomentOperation(ctypes.Structure):
    """moments.h's `operation`."""

    _fields_ = [  # as ctypes wants it
        ("kind", _NUMBER), ("size", _NUMBER), ("mean", _NUMBER), ("var", _NUMBER),
        ("a_mean", _NUMBER), ("a_var", _NUMBER), ("a_size", _NUMBER),
        ("b_mean", _NUMBER), ("b_var", _NUMBER), ("b_size", _NUMBER),
        ("first", _NUMBER), ("second", _NUMBER), ("number", _REAL), ("other", _REAL),
        ("groups", _NUMBER), ("taps", _NUMBER), ("slopes", _NUMBER), ("curve", _ADDRESS),
    ]  # fmt: skip


class SiteScaling(ctypes.Structure):
    """lane.c's `scaling`."""

    _fields_ = [  # as ctypes wants it
        (name, _NUMBER)
        for name in (
            "weight", "gamma", "beta", "shift", "scale", "directions", "mean", "var", "column",
            "groups", "filters", "inputs", "taps", "taps_first", "stride", "center", "blocks", "rank",
        )
    ]  # fmt: skip
