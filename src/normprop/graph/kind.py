"""What a node of a traced model stands for."""

from __future__ import annotations

import enum


class Kind(enum.Enum):
    """What a node's value is to the walk."""

    DATA = "depends on the input's values: has moments"
    TENSOR = "made of parameters alone: known as it is"
    STATIC = "no tensor: a size or a flag of the input, known from the example run"
