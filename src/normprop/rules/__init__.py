"""Moment rules: one table, operation → what it does to `Moments`."""

from normprop.rules import (  # the families register themselves
    arithmetic,
    attention,
    combine,
    drawn,
    elementwise,
    linear,
    normalization,
    pooling,
    reduction,
    select,
    shape,
    spectral,
    stochastic,
)
from normprop.rules.elementwise import module_activation as activation
from normprop.rules.table import TABLE, Rule, RuleTable, rule, unsupported

__all__ = [
    "TABLE", "Rule", "RuleTable", "activation", "rule", "unsupported",
    "arithmetic", "attention", "combine", "drawn", "elementwise", "linear", "normalization", "pooling", "reduction",
    "select", "shape", "spectral", "stochastic",
]  # fmt: skip
