"""Moments of one Gaussian through one activation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normprop.activations import canonical, expectations
from normprop.errors import NormPropError
from normprop.quadrature import integrate

Activation = str | nn.Module | type[nn.Module] | Callable[[Tensor], Tensor]

__all__ = ["ActivationMoments", "activation_moments", "canonical", "module_moments", "moments"]


@dataclass(frozen=True)
class ActivationMoments:
    """What u ~ N(mean, std²) becomes on its way through f.

    mean: E f(u). var: Var f(u). second: E f(u)². slope: E f'(u)² (infinite where f jumps). mean_slope: d E f / d mean = E f'(u),
    jumps included. error: an estimated bound on the absolute error of these numbers.
    """

    mean: Tensor
    var: Tensor
    second: Tensor
    slope: Tensor
    mean_slope: Tensor
    error: Tensor

    @property
    def gain(self) -> Tensor:
        """1/√var: what the output is multiplied with to have unit variance."""
        return self.var.rsqrt()


def moments(fn: Activation, mean: float | Tensor = 0.0, std: float | Tensor = 1.0) -> ActivationMoments:
    """Moments of fn(u) for u ~ N(mean, std²)."""
    known = canonical(fn)
    if known is not None:
        return activation_moments(known[0], mean, std, **known[1])
    if not callable(fn):
        raise NormPropError(f"moments: {fn!r} is neither a name, a module nor a callable")
    m, s, dtype = _prepare(mean, std)
    return _pack(integrate(fn, m, s), dtype)  # type: ignore[arg-type]


def activation_moments(name: str, mean: float | Tensor, std: float | Tensor, **parameters: Any) -> ActivationMoments:
    """Moments of the named activation with its parameters named as in torch.nn.functional; static tensor operations only."""
    m, s, dtype = _prepare(mean, std)
    return _pack(expectations(name, m, s, parameters), dtype)


def module_moments(module: nn.Module, mean: float | Tensor, std: float | Tensor) -> ActivationMoments:
    """Moments of an activation module."""
    return moments(module, mean, std)


def _prepare(mean: float | Tensor, std: float | Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    tensors = [x for x in (mean, std) if isinstance(x, Tensor)]
    dtype = torch.float64
    if tensors:
        dtype = tensors[0].dtype if len(tensors) == 1 else torch.promote_types(tensors[0].dtype, tensors[1].dtype)
        if dtype.is_complex:
            raise NormPropError("moments: complex mean or std")
        if dtype not in (torch.float32, torch.float64):
            dtype = torch.float32
    device = tensors[0].device if tensors else torch.device("cpu")
    compute = torch.float32 if device.type == "mps" else torch.float64
    m, s = torch.broadcast_tensors(
        *(torch.as_tensor(x, device=device, dtype=compute) if not isinstance(x, Tensor) else x.to(compute) for x in (mean, std))
    )
    return m, s, dtype


def _pack(e: tuple[Tensor, ...], dtype: torch.dtype) -> ActivationMoments:
    return ActivationMoments(*(x.to(dtype) for x in e))
