"""What a measured variance counts for: BatchNorm's ε keeps a unit that was hardly ever seen to move from being blown up."""

from __future__ import annotations

import torch
from torch import Tensor

from normprop.conversion.lane import Entry, Lane
from normprop.sites.rows import to_rows
from normprop.sites.site import site_operands

# Of the computed variance of a layer's output, which scales with its weights; BatchNorm's ε for one of 1.
_SHARE = 1e-5


def bounded(
    lane: Lane, root: torch.nn.Module, entry: Entry, measured: Tensor, filters: Tensor | None, var: Tensor
) -> Tensor:
    """A measured variance, or the ε that the computed one holds where that is more; never far below the computed one.

    Args:
        lane: the lane.
        root: the network.
        entry: the site's call.
        measured: Var z, ``(O,)``.
        filters: of the layer before it; None without one.
        var: V, ``(O,)``.
    """
    found = torch.maximum(measured, _SHARE * var.to(measured))
    if not entry.eps:
        return found
    if filters is None:
        return found.clamp(min=entry.eps)
    form, _ = site_operands(lane.arguments(root, entry))
    squares = to_rows(filters, form).square().sum(-1).reshape(-1)
    return torch.maximum(found, entry.eps * form.share * squares.to(found))
