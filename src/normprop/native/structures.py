"""The structures that the compiled functions read, as C lays them out."""

from __future__ import annotations

import ctypes

_NUMBER = ctypes.c_int64


class MomentOperation(ctypes.Structure):
    """moments.h's `operation`."""

    _fields_ = [  # as ctypes wants it
        ("kind", _NUMBER), ("size", _NUMBER), ("mean", _NUMBER), ("var", _NUMBER),
        ("a_mean", _NUMBER), ("a_var", _NUMBER), ("a_size", _NUMBER),
        ("b_mean", _NUMBER), ("b_var", _NUMBER), ("b_size", _NUMBER),
        ("first", _NUMBER), ("second", _NUMBER), ("number", ctypes.c_double),
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
