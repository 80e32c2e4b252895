"""The residual sum that keeps a standardised signal standardised."""

import math
import operator

import torch
from torch import Tensor, fx

from normprop.errors import NormPropError


class ResidualSum(torch.nn.Module):
    """√(1 − a²)·input + a·branch: variance 1, if the two have mean 0, variance 1 and are uncorrelated.

    Why residual networks go deep with it. A standardised layer f can't have a unit Jacobian as well: its squared
    singular values are E σ′²/Var σ, which is 1.467 for ReLU (Arpit et al., 2016, eqs 4–7), so L layers in a row amplify
    gradients by 1.467^(L/2). Here a layer has (1 − a²) + 1.467 a² = 1 + 0.467 a², and with a² = 1/L the product of all
    L of them stays below e^0.467 = 1.60 however large L is, 1.005 in amplitude for each layer of 50.

    Args:
        alpha: a, the weight of the branch, from 0 to 1.
        depth: L, the number of residual sums in a row; stands for a = 1/√L. Give one of the two.

    Shapes:
        `input` and `branch` of the same shape.

    Raises:
        NormPropError: Not exactly one of `alpha` and `depth`, or one that is out of range.

    >>> ResidualSum(0.6)(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([0.8000, 0.6000])
    """

    def __init__(self, alpha: float | None = None, *, depth: int | None = None) -> None:
        super().__init__()
        if (alpha is None) == (depth is None):
            raise NormPropError(
                "ResidualSum needs either alpha or depth.\nGive the branch's weight, or how many sums there are."
            )
        if depth is not None:
            if depth < 1:
                raise NormPropError(f"ResidualSum: depth is {depth}.\nGive the number of residual sums in a row, 1 or more.")
            alpha = depth**-0.5
        assert alpha is not None
        if not 0 <= alpha <= 1:
            raise NormPropError(
                f"ResidualSum: alpha is {alpha}.\nGive a weight from 0 (the skip alone) to 1 (the branch alone)."
            )
        self.alpha = float(alpha)

    def forward(self, input: Tensor, branch: Tensor) -> Tensor:
        """The sum of the skip `input` and the `branch`."""
        return torch.add(input * self._skip(), branch, alpha=self.alpha)

    def folded(self) -> torch.nn.Module:
        """The same sum as a graph of plain torch operations."""
        graph = fx.Graph()
        input, branch = graph.placeholder("input"), graph.placeholder("branch")
        skip = graph.call_function(operator.mul, (input, self._skip()))
        graph.output(graph.call_function(torch.add, (skip, branch), {"alpha": self.alpha}))
        return fx.GraphModule(torch.nn.Module(), graph)

    def extra_repr(self) -> str:
        """The weight of the branch."""
        return f"alpha={self.alpha:.6g}"

    def _skip(self) -> float:
        return math.sqrt(1 - self.alpha**2)
