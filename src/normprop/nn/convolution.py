"""The convolutions of Normalization Propagation."""

import math
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.common_types import _size_1_t, _size_2_t, _size_3_t

from normprop.nn.activation import ActivationLike
from normprop.nn.normalized import Center, Method, NormalizedLayer

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _Convolution(NormalizedLayer):
    """What the convolutions share: torch's layer and its arguments, and inputs without a batch dimension."""

    _torch_layer: ClassVar[type[torch.nn.Module]]
    _arguments: ClassVar[tuple[str, ...]] = ("stride", "padding", "dilation", "groups", "padding_mode")

    in_channels: int
    out_channels: int
    groups: int

    def forward(self, input: Tensor) -> Tensor:
        """The standardised activation of `input`."""
        self._check(input)
        if self.activation is None:
            return cast(Tensor, cast(Any, super()).forward(input))
        return self._activate(cast(Any, self)._conv_forward(input, self.effective_weight(), self.bias))

    def _activate(self, preactivation: Tensor) -> Tensor:
        if preactivation.ndim > 1 + self._spatial_dims:
            return self._standardize(preactivation)
        return self._standardize(preactivation.unsqueeze(0)).squeeze(0)

    def _groups(self) -> int:
        return self.groups

    def _in_channels(self) -> int:
        return self.in_channels

    def _channels(self) -> int:
        return self.out_channels

    def _plain(self) -> torch.nn.Module:
        arguments = {name: getattr(self, name) for name in ("in_channels", "out_channels", "kernel_size", *self._arguments)}
        return self._torch_layer(**arguments, bias=self.bias is not None, device="meta")


class Conv1d(_Convolution, torch.nn.Conv1d):
    """Normalised 1-d convolution with its activation; equation, arguments and errors as in `Conv2d`.

    Shapes:
        Input `(N, in_channels, L)` or `(in_channels, L)`, output as `torch.nn.Conv1d`'s.

    >>> Conv1d(8, 16, 3, padding=1)(torch.randn(2, 8, 10)).shape
    torch.Size([2, 16, 10])
    """

    _torch_layer = torch.nn.Conv1d
    _spatial_dims = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: str | _size_1_t = 0,
        dilation: _size_1_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike | None = "relu",
        method: Method = "exact",
        gain_init: float | None = None,
        center: Center = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._normalize(activation, method, gain_init, center)


class Conv2d(_Convolution, torch.nn.Conv2d):
    """Normalised 2-d convolution with its activation: a standardised input gives a standardised output.

    Eq. 11 of Normalization Propagation (Arpit et al., 2016), with one Frobenius norm, one γ and one β per filter::

        o_i = (1/c1) [ σ(γ_i (W_i * x)/‖W_i‖_F + β_i) − c2 ]

    Assumes inputs that are uncorrelated over channels and positions, with mean 0 and variance 1; zero padding lowers
    the variance at borders. With `method="exact"`, (c2, c1) are the mean and std of σ at N(β_i, γ_i²) and W_i is
    centred; with "paper" they are those at N(0, 1): see `NormalizedLayer`. `weight`, `bias` and `gain` are W, β and γ.
    A filter of a grouped convolution is what makes one output channel.

    Args:
        in_channels: As all up to `dtype`, what `torch.nn.Conv2d` says.
        out_channels: The number of filters.
        kernel_size: Of a filter.
        stride: Between outputs.
        padding: On both sides, or "same" or "valid".
        dilation: Between the taps of a filter.
        groups: Of channels that see only each other.
        bias: Whether there is a β.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: Of the parameters.
        dtype: Of the parameters.
        activation: σ, a name, module or elementwise function; None makes this a plain `torch.nn.Conv2d` for the output.
        method: "exact" or "paper".
        gain_init: What γ starts at; by default 1 ("exact") or 1/√(E σ′²/Var σ) ("paper").
        center: Whether filters are centred; "auto" does so for "exact" where a filter has more than one input channel:
            depthwise filters and a stem on grey images keep their response to constants.

    Shapes:
        Input `(N, in_channels, H, W)` or `(in_channels, H, W)`, output as `torch.nn.Conv2d`'s.

    Raises:
        NormPropError: Unknown activation or method, `center=True` where there is nothing to centre, integer or complex
            numbers, or an input with the wrong number of channels.

    >>> layer = Conv2d(3, 64, 3, padding=1, activation="relu", method="paper")
    >>> layer(torch.randn(2, 3, 8, 8)).shape, sorted(layer.state_dict())
    (torch.Size([2, 64, 8, 8]), ['bias', 'gain', 'weight'])
    """

    _torch_layer = torch.nn.Conv2d
    _spatial_dims = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike | None = "relu",
        method: Method = "exact",
        gain_init: float | None = None,
        center: Center = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._normalize(activation, method, gain_init, center)


class Conv3d(_Convolution, torch.nn.Conv3d):
    """Normalised 3-d convolution with its activation; equation, arguments and errors as in `Conv2d`.

    Shapes:
        Input `(N, in_channels, D, H, W)` or `(in_channels, D, H, W)`, output as `torch.nn.Conv3d`'s.

    >>> Conv3d(2, 4, 3, padding=1)(torch.randn(2, 2, 4, 4, 4)).shape
    torch.Size([2, 4, 4, 4, 4])
    """

    _torch_layer = torch.nn.Conv3d
    _spatial_dims = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: str | _size_3_t = 0,
        dilation: _size_3_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike | None = "relu",
        method: Method = "exact",
        gain_init: float | None = None,
        center: Center = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._normalize(activation, method, gain_init, center)


class ConvTranspose2d(_Convolution, torch.nn.ConvTranspose2d):
    """Normalised 2-d transposed convolution with its activation; equation, arguments and errors as in `Conv2d`.

    A filter is what makes one output channel: dimensions 0 and 2, 3 of the weight, within its group. "paper" divides by
    its Frobenius norm, as printed. "exact" divides by the root of the average output variance: an input reaches only
    one output in ∏stride through each tap, so that is ‖W‖²/∏stride. Where the kernel isn't a multiple of the stride, or
    its taps differ in size, outputs at different phases have different variances around this average.

    Shapes:
        Input `(N, in_channels, H, W)` or `(in_channels, H, W)`, output as `torch.nn.ConvTranspose2d`'s.

    >>> ConvTranspose2d(4, 2, 2, stride=2)(torch.randn(1, 4, 8, 8)).shape
    torch.Size([1, 2, 16, 16])
    """

    _torch_layer = torch.nn.ConvTranspose2d
    _arguments = ("stride", "padding", "output_padding", "groups", "dilation")
    _channel_dim = 1
    _spatial_dims = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: _size_2_t = 0,
        output_padding: _size_2_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_2_t = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike | None = "relu",
        method: Method = "exact",
        gain_init: float | None = None,
        center: Center = "auto",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self._normalize(activation, method, gain_init, center)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The standardised activation of `input`; `output_size` as in `torch.nn.ConvTranspose2d`."""
        self._check(input)
        if self.activation is None:
            return torch.nn.ConvTranspose2d.forward(self, input, output_size)
        stride, padding = cast(list[int], list(self.stride)), cast(list[int], list(self.padding))
        kernel, dilation = cast(list[int], list(self.kernel_size)), cast(list[int], list(self.dilation))
        output_padding = self._output_padding(input, output_size, stride, padding, kernel, 2, dilation)
        preactivation = F.conv_transpose2d(
            input, self.effective_weight(), self.bias, stride, padding, output_padding, self.groups, dilation
        )
        return self._activate(preactivation)

    def _stretch(self) -> float:
        return 1.0 if self.method == "paper" else math.sqrt(math.prod(self.stride))
