"""Filters: the slices of a weight that feed one output channel each, and their unit-length form."""

import torch
from torch import Tensor

from normprop.errors import NormPropError
from normprop.precision import accumulation_dtype
from normprop.sites.reference import plain_scale
from normprop.sites.rows import Form, Operands


def filter_view(weight: Tensor, channel_dim: int = 0, groups: int = 1) -> tuple[Tensor, tuple[int, ...]]:
    """A view of `weight` and its dimensions that run *inside* a filter: reduce over them and filters remain.

    `channel_dim` 0 is the layout of linear layers and convolutions, `(out, in/groups, *kernel)`, where `weight[i]` is
    filter i whatever `groups` is. `channel_dim` 1 is that of transposed convolutions, `(in, out/groups, *kernel)`,
    whose first dimension is split into `groups` blocks; the view then is `(groups, in/groups, out/groups, *kernel)`.

    Raises:
        NormPropError: `weight` has fewer than two dimensions, or `channel_dim` is neither 0 nor 1.

    >>> view, inside = filter_view(torch.ones(4, 3, 5, 5), channel_dim=1, groups=2)
    >>> view.shape, view.sum(inside).shape
    (torch.Size([2, 2, 3, 5, 5]), torch.Size([2, 3]))
    """
    if weight.ndim < 2:
        raise NormPropError(
            f"A tensor of shape {tuple(weight.shape)} has no filters.\n"
            "Filters are slices of a weight with two dimensions or more; leave gains and biases out."
        )
    if channel_dim == 0:
        return weight, tuple(range(1, weight.ndim))
    if channel_dim == 1:
        # Splitting a dimension is a view for every memory format, channels_last included; flattening would copy.
        view = torch.unflatten(weight, 0, (groups, weight.shape[0] // groups))
        return view, (1, *range(3, view.ndim))
    raise NormPropError(
        f"channel_dim is {channel_dim}, and a filter's channel is dimension 0 or 1 of its weight.\n"
        "Give 0 for linear layers and convolutions, 1 for transposed convolutions."
    )


def filter_norms(view: Tensor, inside: tuple[int, ...]) -> Tensor:
    """The Frobenius norm of every filter of a `filter_view`, reduced dimensions kept, in float32 at least."""
    norms: Tensor = torch.linalg.vector_norm(view, dim=inside, keepdim=True, dtype=accumulation_dtype(view.dtype))
    return norms


def unit_filters(
    weight: Tensor,
    gain: Tensor | None = None,
    *,
    channel_dim: int = 0,
    groups: int = 1,
    center: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """The weight whose filters are `scale · gain_i · W_i / ‖W_i‖`, with `W_i − mean W_i` for `W_i` if `center`.

    This is the normalisation inside eqs 9 and 11 of Normalization Propagation (Arpit et al., 2016) moved from the
    output to the weight, where it is the same function and does not grow with the batch. A filter that vanishes, or
    that centring reduces to rounding noise, has no direction: it is left at its (zero) length, so that outputs and
    gradients stay finite.

    Shapes: `gain` holds one value per filter, `(out,)`; the result has the shape and dtype of `weight`.

    >>> unit_filters(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([2.0, 2.0]))
    tensor([[1.2000, 1.6000],
            [0.0000, 0.0000]])
    """
    if weight.ndim < 2 or channel_dim not in (0, 1):
        filter_view(weight, channel_dim, groups)  # which says what is wrong
    wide = weight.to(accumulation_dtype(weight.dtype))
    form = Form(groups if channel_dim else 1, channel_dim == 1, 1, center)
    count = weight.shape[1] * groups if channel_dim else len(weight)
    gamma = wide.new_full((count,), scale) if gain is None else gain.to(wide.dtype).reshape(-1) * scale
    zeros, ones = wide.new_zeros(count), wide.new_ones(count)
    found = plain_scale(form, Operands(wide, None, None, gamma, zeros, zeros, ones)).weight
    assert found is not None
    return found.to(weight.dtype)
