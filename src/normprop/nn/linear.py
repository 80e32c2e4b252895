"""The fully connected layer of Normalization Propagation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.nn.activation import ActivationLike
from normprop.nn.normalized import Center, Method, NormalizedLayer


class Linear(NormalizedLayer, torch.nn.Linear):
    """Normalised linear layer with its activation: a standardised input gives a standardised output.

    Eq. 9 of Normalization Propagation (Arpit et al., 2016)::

        o_i = (1/c1) [ σ(γ_i (W_i·x)/‖W_i‖₂ + β_i) − c2 ]

    Assumes inputs that are uncorrelated, with mean 0 and variance 1. With `method="exact"`, (c2, c1) are the mean and
    std of σ at N(β_i, γ_i²) and W_i is centred; with "paper" they are those at N(0, 1): see `NormalizedLayer`.
    `weight`, `bias` and `gain` are W, β and γ.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Whether there is a β.
        device: Of the parameters.
        dtype: Of the parameters.
        activation: σ, a name, module or elementwise function; None makes this a plain `torch.nn.Linear` for the output.
        method: "exact" or "paper".
        gain_init: What γ starts at; by default 1 ("exact") or 1/√(E σ′²/Var σ) ("paper").
        center: Whether filters are centred; "auto" does so for "exact" and more than one input.

    Shapes:
        Input `(*, in_features)`, output `(*, out_features)`.

    Raises:
        NormPropError: Unknown activation or method, `center=True` where there is nothing to centre, integer or complex
            numbers, or an input with the wrong number of features.

    >>> layer = Linear(100, 10, activation="relu")
    >>> output = layer(torch.randn(10_000, 100))
    >>> bool(output.mean().abs() < 0.1), bool((output.std() - 1).abs() < 0.1)
    (True, True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike | None = "relu",
        method: Method = "exact",
        gain_init: float | None = None,
        center: Center = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._normalize(activation, method, gain_init, center)

    def forward(self, input: Tensor) -> Tensor:
        """The standardised activation of `input`."""
        self._check(input)
        if self.activation is None:
            return super().forward(input)
        preactivation = F.linear(input, self.effective_weight(), self.bias)
        rows = preactivation.reshape(-1, self.out_features)
        return self._standardize(rows).reshape(preactivation.shape)

    def _in_channels(self) -> int:
        return self.in_features

    def _channels(self) -> int:
        return self.out_features

    def _plain(self) -> torch.nn.Module:
        return torch.nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
