"""Means and variances of recurrent states in the long run, from those of the pre-activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normprop.activations.fast_moments import lane_moments
from normprop.errors import NormPropError


class Gaussian(NamedTuple):
    """Mean and variance of pre-activations; tensors of one shape."""

    mean: Tensor
    var: Tensor

    def rows(self, gates: int) -> list[Gaussian]:
        """Those of each gate, where they lie one after another."""
        return [Gaussian(*pair) for pair in zip(self.mean.chunk(gates), self.var.chunk(gates), strict=True)]


class State(NamedTuple):
    """Mean and standard deviation of a state before it is standardised, and the mean and deviation of an LSTM's cell."""

    mean: Tensor
    std: Tensor
    cell_mean: Tensor | None = None
    cell_std: Tensor | None = None


def elman_state(activation: str, preactivation: Gaussian) -> State:
    """That of y = σ(u): E σ(u) and √Var σ(u).

    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> elman_state("relu", Gaussian(zero, one)).mean
    tensor([0.3989])
    """
    mean, var = lane_moments(activation, *preactivation, {})
    return State(mean, var.sqrt())


def lstm_state(preactivations: list[Gaussian], gain: Tensor | None) -> State:
    """That of y_t = σ(o) tanh(γ c_t / √Var c), where c_t = σ(f) c_{t−1} + σ(i) tanh(g).

    For gates (i, f, g, o) that are independent of each other and of c_{t−1}, mean and second moment of c are those that
    a step leaves as they are::

        E c = E σ(i) E tanh(g) / (1 − E σ(f))
        E c² = (E σ(i)² E tanh(g)² + 2 E σ(f) E c E σ(i) E tanh(g)) / (1 − E σ(f)²)

    Without means this is Laurent, Ballas & Vincent (2017), section 3: Var c = Var tanh(g) E σ(i)² / (1 − E σ(f)²).

    Args:
        preactivations: Those of i, f, g and o.
        gain: γ; without one y_t = σ(o) tanh(c_t), as in an LSTM that isn't normalised.
    """
    (i, i_square), (f, f_square), (g, g_square), (o, o_square) = (
        _first_and_second(name, at)
        for name, at in zip(("sigmoid", "sigmoid", "tanh", "sigmoid"), preactivations, strict=True)
    )
    cell_mean = i * g / (1 - f)
    cell_second = (i_square * g_square + 2 * f * cell_mean * i * g) / (1 - f_square)
    cell_var = cell_second - cell_mean.square()
    cell_std = cell_var.sqrt()
    at = Gaussian(cell_mean, cell_var) if gain is None else Gaussian(gain * cell_mean / cell_std, gain.square())
    t, t_square = _first_and_second("tanh", at)
    mean = o * t
    return State(mean, (o_square * t_square - mean.square()).sqrt(), cell_mean, cell_std)


def gru_state(preactivations: list[Gaussian], recurrent: Gaussian) -> State:
    """That of y_t = (1 − z) n + z y_{t−1}, where n = tanh(u + r v).

    For r, z, u and v that are independent of each other and of y_{t−1}, u + r v is taken to be normal, and mean and variance
    of y are those that a step leaves as they are::

        E y = E n        Var y = Var n · E(1 − z)² / (1 − E z²)

    Args:
        preactivations: Those of r, z and u.
        recurrent: That of v.
    """
    reset, update, candidate = preactivations
    r, r_square = _first_and_second("sigmoid", reset)
    z, z_square = _first_and_second("sigmoid", update)
    var = candidate.var + r_square * recurrent.var + (r_square - r.square()) * recurrent.mean.square()
    mean, var = lane_moments("tanh", candidate.mean + r * recurrent.mean, var, {})
    return State(mean, (var * (1 - 2 * z + z_square) / (1 - z_square)).sqrt())


def _first_and_second(name: str, at: Gaussian) -> tuple[Tensor, Tensor]:
    mean, var = lane_moments(name, *at, {})
    return mean, var + mean.square()


def finite(state: State, layer: str) -> State:
    """The state, checked.

    Raises:
        NormPropError: its standard deviation is 0, infinite or NaN, or that of its cell.
    """
    for std in (state.std, state.cell_std):
        if std is not None and not bool(torch.all((std > 0) & std.isfinite())):
            found = std.flatten()[0].item()
            raise NormPropError(
                f"{layer}: with these initial gains and biases the state has a standard deviation of {found}.\n"
                "Use smaller gains, or a bias nearer to 0."
            )
    return state
