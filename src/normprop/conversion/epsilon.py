"""What a measured variance counts for: BatchNorm's ε keeps a unit that was hardly ever seen to move from being blown up."""

from __future__ import annotations

import torch
from torch import Tensor

from normprop.conversion.entry import Entry
from normprop.sites.rows import to_rows
from normprop.sites.site import SiteArguments, site_operands

# Of the computed variance of a layer's output, which scales with its weights; BatchNorm's ε for one of 1.
_SHARE = 1e-5


def bounded(entry: Entry, call: SiteArguments, measured: Tensor, var: Tensor) -> Tensor:
    """A measured variance, or the ε that the computed one holds where that is more; never far below the computed one.

    Args:
        entry: the site's call.
        call: what `site_scales` takes for it.
        measured: Var z, ``(O,)``.
        var: V, ``(O,)``.
    """
    found = torch.maximum(measured, _SHARE * var.to(measured))
    if not entry.eps:
        return found
    form, given = site_operands(call)
    if given.weight is None:
        return found.clamp(min=entry.eps)
    squares = to_rows(given.weight, form).square().sum(-1).reshape(-1)  # of filters with one input, which are not centred
    return torch.maximum(found, entry.eps * form.share * squares.to(found))
