"""What the normalised layers share: unit filters, a gain, an activation and its standardisation."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from normprop.errors import NormPropError
from normprop.nn.activation import Activation, ActivationLike
from normprop.nn.filters import unit_filters
from normprop.nn.plain import plain_graph

Method = Literal["paper", "exact"]
Center = bool | Literal["auto"]


class NormalizedLayer(torch.nn.Module, ABC):
    """Mixed into a torch layer, makes it eq. 9 or 11 of Normalization Propagation (Arpit et al., 2016) with its σ.

    Assumes inputs that are standardised and uncorrelated, as the outputs then are. For filter i, of which `weight`,
    `gain` and `bias` hold W, γ and β, u_i = γ_i (W_i * x)/‖W_i‖ + β_i is taken to be N(β_i, γ_i²), and::

        method="paper"    o_i = (σ(u_i) − c2) / c1                      c2, c1: mean and std of σ at N(0, 1)
        method="exact"    o_i = (σ(u_i) − m(β_i, γ_i)) / s(β_i, γ_i)    m, s: mean and std of σ at N(β_i, γ_i²)

    "paper" is as printed: γ starts at 1/√(E σ′²/Var σ) (1/1.21 for ReLU), and the constants are wrong as soon as γ ≠ 1
    or β ≠ 0. "exact" is right for all γ and β, starts at γ = 1, and centres the filters (W_i − mean W_i for W_i), so
    that the mean which neighbouring units share isn't amplified layer by layer.

    All of it is a differentiable re-parametrisation of the torch layer: one call with an effective weight, the
    activation, one multiplication and addition per channel. Each output depends on its own sample only; there are no
    buffers.
    """

    weight: Tensor
    bias: Any  # Tensor or None, which torch's layers declare each in its own way
    gain: Parameter | None
    activation: Activation | None

    _channel_dim = 0
    _spatial_dims = 0

    def _normalize(self, activation: ActivationLike | None, method: Method, gain_init: float | None, center: Center) -> None:
        """Finish what torch's constructor has begun."""
        if method not in ("paper", "exact"):
            self._refuse(
                f"unknown method {method!r}", "Give 'exact' (moments at γ and β) or 'paper' (eqs 9, 11 as printed)."
            )
        if not self.weight.is_floating_point():
            self._refuse(f"the dtype is {self.weight.dtype}", "Give a real floating-point dtype.")
        if activation is None and (gain_init is not None or center is True):
            self._refuse("gain_init or center without an activation", "A plain output layer (activation=None) has neither.")
        self.method = method
        self.gain_init = gain_init
        self.center = activation is not None and self._centers(center)
        self.activation = None if activation is None else Activation(activation)
        if self.activation is not None and isinstance(activation, str | type):
            self.activation.to(self.weight)  # a module of the caller's stays where it is
        self.register_parameter("gain", None if activation is None else Parameter(self.weight.new_empty(self._channels())))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot filters of unit length, β = 0, γ as `gain_init` or the method says; a plain layer as torch does."""
        if not hasattr(self, "gain"):
            return  # torch's constructor calls this before there is a gain
        if self.gain is None or self.activation is None:
            cast(Any, super()).reset_parameters()
            return
        torch.nn.init.xavier_uniform_(self.weight)
        with torch.no_grad():
            self.weight.copy_(unit_filters(self.weight, channel_dim=self._channel_dim, groups=self._groups()))
            if self.bias is not None:
                self.bias.zero_()
            if self.gain_init is not None:
                self.gain.fill_(self.gain_init)
            elif self.method == "paper":
                self.gain.copy_(1 / self.activation.jacobian())
            else:
                self.gain.fill_(1.0)

    def filters(self) -> Iterator[tuple[Parameter, int, int]]:
        """`(weight, channel_dim, groups)`, as for `filter_view`, of what may be rescaled; nothing in a plain layer."""
        if self.gain is not None:
            yield cast(Parameter, self.weight), self._channel_dim, self._groups()

    def effective_weight(self) -> Tensor:
        """γ W/‖W‖, the weight that torch's layer is called with, in the shape and dtype of `weight`."""
        return unit_filters(
            self.weight,
            self.gain,
            channel_dim=self._channel_dim,
            groups=self._groups(),
            center=self.center,
            scale=self._stretch(),
        )

    def folded(self) -> torch.nn.Module:
        """The same function in plain torch: torch's layer, the activation, a scale and a shift per channel."""
        plain = self._plain().train(self.training)
        with torch.no_grad():
            plain.weight = Parameter(self.weight.clone() if self.activation is None else self.effective_weight())
            if self.bias is not None:
                plain.bias = Parameter(self.bias.clone())
            if self.activation is None:
                return plain
            scale, shift = self.activation.affine(2 + self._spatial_dims, *self._statistics())
            scale, shift = (x.to(self.weight.dtype) if isinstance(x, Tensor) else x for x in (scale, shift))
            return plain_graph(plain, self.activation.fn, scale, shift).train(self.training)

    def extra_repr(self) -> str:
        """torch's own, then ours."""
        torch_repr = super().extra_repr()
        if self.activation is None:
            return f"{torch_repr}, activation=None"
        gain = "" if self.gain_init is None else f", gain_init={self.gain_init}"
        return f"{torch_repr}, method={self.method!r}, center={self.center}{gain}"

    def _standardize(self, preactivation: Tensor) -> Tensor:
        """The activation and eq. 12's outer part for a pre-activation whose channels are in dimension 1."""
        assert self.activation is not None
        return cast(Tensor, self.activation(preactivation, *self._statistics()))

    def _statistics(self) -> tuple[Tensor | None, Tensor | None]:
        """Mean and std of the pre-activations; None for 0 and 1."""
        return (None, None) if self.method == "paper" else (self.bias, self.gain)

    def _check(self, input: Tensor) -> None:
        channels, dim = self._in_channels(), -1 - self._spatial_dims
        if not input.is_floating_point():
            self._refuse(f"the input is {input.dtype}", "Convert it to the weight's dtype and standardise it.")
        if input.ndim < -dim or input.shape[dim] != channels:
            self._refuse(
                f"an input of shape {tuple(input.shape)} hasn't {channels} channels in dimension {dim}",
                "Give the layer the number that its input has, or move the channels to that dimension.",
            )

    def _centers(self, center: Center) -> bool:
        inputs = self.weight.shape[1 - self._channel_dim] // (self._groups() if self._channel_dim else 1)
        fan_in = inputs * self.weight[0, 0].numel()
        if center == "auto":
            # A centred filter with one input channel doesn't respond to a constant, with fan-in 1 to nothing.
            return self.method == "exact" and inputs > 1
        if center and self.method == "paper":
            self._refuse("center=True with method='paper'", "The paper doesn't centre its filters; give method='exact'.")
        if center and fan_in < 2:
            self._refuse("center=True with a fan-in of 1", "Such a filter vanishes when it is centred; give center=False.")
        return center

    def _refuse(self, what: str, remedy: str) -> None:
        raise NormPropError(f"{type(self).__name__}: {what}.\n{remedy}")

    def _groups(self) -> int:
        return 1

    def _stretch(self) -> float:
        """What ‖W‖ is larger than the standard deviation of an output by."""
        return 1.0

    @abstractmethod
    def _in_channels(self) -> int: ...

    @abstractmethod
    def _channels(self) -> int: ...

    @abstractmethod
    def _plain(self) -> torch.nn.Module:
        """torch's own layer on the meta device, waiting for its parameters."""
