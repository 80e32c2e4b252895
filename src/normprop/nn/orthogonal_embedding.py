"""Symbols as standardised vectors that are orthogonal to each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normprop.errors import NormPropError


class OrthogonalEmbedding(torch.nn.Module):
    """One-hot inputs through a fixed orthogonal map, so that they suit a layer that assumes standardised inputs.

    Row k of a random matrix Q with orthonormal rows, times √embedding_dim (after Laurent, Ballas & Vincent, 2017, who feed
    characters to their LSTM so): E x_j² = 1 over the components of any symbol, and different symbols are orthogonal, as
    one-hot vectors are. Nothing is learned: the layer behind learns its weights in rotated coordinates.

    Args:
        num_embeddings: How many symbols there are.
        embedding_dim: Features; as many as symbols by default, and not fewer.
        seed: Of Q.
        device: Of Q.
        dtype: Of Q.

    Shapes:
        Integers of any shape `(*)`; output `(*, embedding_dim)`.

    Raises:
        NormPropError: There are fewer features than symbols.

    >>> codes = OrthogonalEmbedding(4)(torch.arange(4))
    >>> torch.allclose(codes @ codes.T, 4 * torch.eye(4), atol=1e-5)
    True
    """

    weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int | None = None,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embedding_dim = num_embeddings if embedding_dim is None else embedding_dim
        if not 1 <= num_embeddings <= embedding_dim:
            raise NormPropError(
                f"OrthogonalEmbedding: {num_embeddings} symbols can't be orthogonal in {embedding_dim} features.\n"
                "Leave embedding_dim out, or give as many features as symbols or more."
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        generator = torch.Generator().manual_seed(seed)
        codes = torch.empty(num_embeddings, embedding_dim, dtype=torch.float64, device="cpu")
        torch.nn.init.orthogonal_(codes, math.sqrt(embedding_dim), generator=generator)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        device = torch.get_default_device() if device is None else device
        self.register_buffer("weight", codes.to(device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """The vectors of symbols."""
        return torch.nn.functional.embedding(input, self.weight)

    def extra_repr(self) -> str:
        """Symbols and features."""
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def folded(self) -> torch.nn.Module:
        """The same in plain torch."""
        plain: torch.nn.Module = torch.nn.Embedding.from_pretrained(self.weight.clone())
        return plain
