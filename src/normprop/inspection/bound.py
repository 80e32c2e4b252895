"""The canonical error bound: how far a linear map's output is from being uncorrelated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from normprop.errors import NormPropError
from normprop.nn.filters import filter_view

_BLOCK_ELEMENTS = 2**23  # of one block of the Gram matrix: 64 MB in float64, whatever the number of rows


@dataclass(frozen=True)
class CanonicalErrorBound:
    """What Proposition 1 says of a weight: `error ≤ bound`, with the minimiser `alpha`, one value per row."""

    bound: float
    coherence: float
    error: float
    alpha: Tensor


def canonical_error_bound(weight: Tensor | torch.nn.Module, *, sigma: float = 1.0) -> CanonicalErrorBound:
    """Proposition 1 for the rows of `weight`: its two sides, the coherence and the diagonal that is closest to Cov(Wx).

    Assumes inputs x with E x = 0 and E xxᵀ = σ²I. With Σ = Cov(Wx) = σ²WWᵀ (Arpit et al., 2016, Proposition 1)::

        error = min_α ‖Σ − diag α‖_F  ≤  bound = σ² μ √(Σ_{i≠j} ‖W_i‖²‖W_j‖²)
        alpha_i = σ²‖W_i‖²               coherence μ = max_{i≠j} |W_i·W_j| / (‖W_i‖‖W_j‖)

    A zero row is incoherent with every other. Everything is computed in float64, block by block.

    Args:
        weight: `(rows, columns)`, a convolution's `(out, in/groups, *kernel)` whose filters are flattened to rows, or a
            linear or convolution layer, whose stored weight is taken; filters of different groups share no input, so
            they are uncorrelated.
        sigma: standard deviation σ of the inputs.

    Raises:
        NormPropError: no real floating-point weight with two dimensions or more.

    >>> canonical_error_bound(torch.eye(3), sigma=2.0)
    CanonicalErrorBound(bound=0.0, coherence=0.0, error=0.0, alpha=tensor([4., 4., 4.], dtype=torch.float64))
    """
    rows = _rows(weight)
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    unit = rows / torch.where(norms > 0, norms, 1.0)
    coherence, error_squared = 0.0, 0.0
    for directions, lengths in zip(unit, norms.squeeze(-1), strict=True):
        peak, energy = _off_diagonal(directions, lengths)
        coherence, error_squared = max(coherence, peak), error_squared + energy
    alpha = norms.flatten().square()
    # Σ_{i≠j} n_i n_j = 2 Σ_i n_i Σ_{j<i} n_j: a sum of positive terms, where (Σn)² − Σn² would cancel.
    pairs = 2 * (alpha[1:] * alpha.cumsum(0)[:-1]).sum().item()
    variance = sigma**2
    return CanonicalErrorBound(
        bound=variance * coherence * pairs**0.5,
        coherence=coherence,
        error=variance * error_squared**0.5,
        alpha=variance * alpha,
    )


def _rows(weight: Tensor | torch.nn.Module) -> Tensor:
    """Filters as rows, `(groups, rows per group, columns)`; filters of different groups never meet."""
    channel_dim, groups = 0, 1
    if isinstance(weight, torch.nn.Module):
        channel_dim, groups = int(getattr(weight, "transposed", False)), int(getattr(weight, "groups", 1))
        weight = getattr(weight, "weight", weight)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim < 2:
        raise NormPropError(
            "The canonical error bound needs a real floating-point weight with two dimensions or more.\n"
            "Give a matrix, a convolution's weight, or a linear or convolution layer."
        )
    view, _ = filter_view(weight.detach().double(), channel_dim, groups)
    if channel_dim == 1:
        return view.transpose(1, 2).flatten(2)
    rows = view.flatten(1)
    return rows.reshape(groups, rows.shape[0] // groups, rows.shape[1])


def _off_diagonal(directions: Tensor, lengths: Tensor) -> tuple[float, float]:
    """max |cos| and Σ (W_i·W_j)² over the pairs i ≠ j of one group."""
    count = len(directions)
    block = max(1, _BLOCK_ELEMENTS // max(1, count))
    peak, energy = 0.0, 0.0
    for start in range(0, count, block):
        # The Gram matrix is symmetric: the strict upper triangle has every pair once.
        cosines = (directions[start : start + block] @ directions[start:].T).triu_(1)
        peak = max(peak, cosines.abs().max().item())
        cosines.mul_(lengths[start : start + block, None]).mul_(lengths[start:])
        energy += 2 * cosines.square_().sum().item()
    return min(peak, 1.0), energy
