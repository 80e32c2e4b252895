"""Moments of one Gaussian through one activation."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normprop.activations.breakpoints import Breakpoints, check_elementwise, find_breakpoints
from normprop.activations.catalogue import canonical, expectations, torch_function
from normprop.activations.error_bounds import unresolved_error, unseen_error
from normprop.activations.normal import Expectations, density, has_values
from normprop.activations.quadrature import integrate, mean_and_variance
from normprop.errors import NormPropError
from normprop.precision import working_dtype

Activation = str | nn.Module | type[nn.Module] | Callable[..., Tensor]

__all__ = [
    "ActivationMoments", "activation_moments", "canonical", "check_elementwise", "function_moments", "mean_and_var",
    "module_moments", "moments",
]  # fmt: skip

_ORDERS = (12, 16, 20, 24)
_TARGET = 1e-12
_REACH = 37.0
# Panels at a time of an unknown function, for few and for many Gaussians.
_PANELS, _FEW_PANELS, _FEW = 2048, 256, 8


@dataclass(frozen=True)
class ActivationMoments:
    """What u ~ N(mean, std²) becomes on its way through f; tensors of the shape of mean and std.

    mean: E f(u). var: Var f(u). second: E f(u)². slope: E f'(u)², infinite where f jumps. mean_slope: d E f / d mean,
    which is E f'(u) and the density at every jump times its height. error: an estimated bound on the absolute error
    of the first four.
    """

    mean: Tensor
    var: Tensor
    second: Tensor
    slope: Tensor
    mean_slope: Tensor
    error: Tensor

    @property
    def gain(self) -> Tensor:
        """1/√var: the factor that gives the output unit variance."""
        return self.var.rsqrt()


def moments(fn: Activation, mean: float | Tensor = 0.0, std: float | Tensor = 1.0) -> ActivationMoments:
    """Moments of fn(u) for u ~ N(mean, std²), differentiable in mean, std and fn's learned parameters.

    Known activations take a closed form, or a fixed quadrature of the known slope where there is none; both have a
    relative error below 1e-12 in float64 (the quadrature while the variance is above 1e-60), the mean relative to E|f|.
    Anything else is searched for kinks and jumps and integrated panel by panel, until two rules agree. At std = 0 the
    result is the limit of a small std. RReLU counts as in evaluation, where it is not random.

    Args:
        fn: a name ("relu", "gelu", "torch.special.i0"), an activation module or its class, a function of torch, a
            functools.partial of one, or any elementwise callable.
        mean: number or tensor.
        std: number or tensor, not negative; broadcasts against mean.

    Returns:
        float64 for numbers, the promoted dtype of the tensors otherwise (float32 for integers and half precision).

    Raises:
        NormPropError: unknown name; complex, negative or NaN input; fn is not elementwise, is random, is NaN where
            the Gaussian has mass, or grows too fast for its second moment to exist.

    >>> result = moments("relu")  # Remark 1 of the paper: 1/√(2π) and ½(1 − 1/π)
    >>> print(f"{result.mean:.6f} {result.var:.6f}")
    0.398942 0.340845
    >>> moments(lambda u: torch.where(u > 1, u.square(), -u)).mean
    tensor(0.6426, dtype=torch.float64)
    """
    _check_values(mean, std)
    known = canonical(fn)
    if known is not None:
        return activation_moments(known[0], mean, std, **known[1])
    if isinstance(fn, str):
        fn = torch_function(fn)
    function: Callable[..., Any] = fn() if isinstance(fn, type) else fn
    if not callable(function):
        raise NormPropError(f"{fn!r} is neither the name of an activation nor a module nor a callable")
    m, s, dtype = _prepare(mean, std)
    return _pack(_adaptive(function, m, s), dtype)


def activation_moments(name: str, mean: float | Tensor, std: float | Tensor, **parameters: Any) -> ActivationMoments:
    """Moments of the named activation, its parameters named as in torch.nn.functional; static tensor operations only.

    >>> activation_moments("leaky_relu", 0.0, 1.0, negative_slope=0.2).slope
    tensor(0.5200, dtype=torch.float64)
    """
    m, s, dtype = _prepare(mean, std)
    shape = torch.broadcast_shapes(m.shape, *(p.shape for p in parameters.values() if isinstance(p, Tensor)))
    found = expectations(name, m.expand(shape), s.expand(shape), parameters, order=10 if dtype == torch.float64 else 7)
    return _pack(found, dtype)


def module_moments(module: nn.Module, mean: float | Tensor, std: float | Tensor) -> ActivationMoments:
    """Moments of an activation module, its learned parameters included in the graph."""
    return moments(module, mean, std)


def function_moments(
    fn: Callable[[Tensor], Tensor], mean: float | Tensor, std: float | Tensor, points: Breakpoints
) -> ActivationMoments:
    """Moments of an elementwise function whose bends are known already; static tensor operations only.

    Args:
        fn: takes float64 tensors of any shape.
        mean: number or tensor.
        std: number or tensor.
        points: from `normprop.activations.breakpoints.find_breakpoints`.

    >>> points = find_breakpoints(torch.relu)
    >>> function_moments(torch.relu, 0.0, 1.0, points).second
    tensor(0.5000, dtype=torch.float64)
    """
    m, s, dtype = _prepare(mean, std)
    return _pack(integrate(fn, m, s, points), dtype)


def mean_and_var(
    fn: Callable[[Tensor], Tensor],
    mean: float | Tensor,
    var: float | Tensor,
    points: Sequence[float],
    *,
    kinked: bool = True,
    jumping: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and variance alone of `function_moments`, as exact as the result's dtype can show, and cheaper.

    Args:
        fn: takes float64 tensors of any shape.
        mean: number or tensor.
        var: number or tensor; at 0 derivatives are those of the limit.
        points: ascending; where fn bends.
        kinked: whether fn may have a kink or a jump.
        jumping: whether it may have a jump.
    """
    m, v, dtype = _prepare(mean, var)
    order, reach = (12, 14.0) if dtype == torch.float64 else (8, 10.0)
    average, spread = mean_and_variance(fn, m, v, points, order=order, reach=reach, kinked=kinked, jumping=jumping)
    return average.to(dtype), spread.to(dtype)


def _prepare(mean: float | Tensor, std: float | Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both as tensors of one shape in the precision of the computation, and the dtype of the result."""
    tensors = [x for x in (mean, std) if isinstance(x, Tensor)]
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors]) if tensors else torch.float64
    if dtype.is_complex:
        raise NormPropError("a Gaussian here has a real mean and std; these are complex")
    if dtype not in (torch.float32, torch.float64):
        dtype = torch.float32
    device = tensors[0].device if tensors else torch.device("cpu")
    compute = working_dtype(device)
    m, s = (
        x.to(compute) if isinstance(x, Tensor) else torch.as_tensor(x, dtype=compute, device=device) for x in (mean, std)
    )
    shape = torch.broadcast_shapes(m.shape, s.shape)
    return m.expand(shape), s.expand(shape), dtype


def _check_values(mean: float | Tensor, std: float | Tensor) -> None:
    """Refuse what is no Gaussian; only here, so that a network on its way to divergence just carries its NaN on."""
    m, s, _ = _prepare(mean, std)
    if has_values(m) and has_values(s):
        if bool((~(s >= 0)).any()):
            raise NormPropError("std is negative or NaN")
        if bool(m.isnan().any()):
            raise NormPropError("mean is NaN")


def _pack(e: Expectations, dtype: torch.dtype) -> ActivationMoments:
    """In the result's dtype, whose rounding is part of the error."""
    if dtype == torch.float64:
        return ActivationMoments(*e)
    size = torch.stack([torch.where(x.isinf(), 0.0, x).abs().detach() for x in e[:4]]).amax(0)
    e = e._replace(error=e.error + torch.finfo(dtype).eps * size)
    return ActivationMoments(*(x.to(dtype) for x in e))


def _adaptive(fn: Callable[[Tensor], Tensor], mean: Tensor, std: Tensor) -> Expectations:
    """Search for kinks over the range of all means and stds, then raise the order until two rules agree."""
    if mean.numel() == 0:
        return Expectations(*(torch.zeros_like(mean) for _ in range(6)))
    if not (has_values(mean) and has_values(std)):
        raise NormPropError(
            "an unknown callable is searched for kinks, which needs values: call find_breakpoints and integrate"
        )
    reach = _REACH * std.detach()
    low, high = float((mean.detach() - reach).min()), float((mean.detach() + reach).max())
    check_elementwise(fn, low, high)
    margin = 1e-3 * max(1.0, abs(low), abs(high))
    points = find_breakpoints(fn, low - margin, high + margin, limit=_FEW_PANELS if mean.numel() > _FEW else _PANELS)
    for order in _ORDERS:
        result = integrate(fn, mean, std, points, order=order)
        size = result.second.detach() + torch.where(result.slope.isinf(), 0.0, result.slope).detach()
        if bool((result.error <= _TARGET * size).all()):
            break
    made = _check_finite(fn, result, mean.detach(), reach)
    error = result.error
    if torch.finfo(made).eps > torch.finfo(mean.dtype).eps:  # a function that computes in less than it is given
        error = error + 2.0 * torch.finfo(made).eps * (size + result.mean.detach().abs())
    if points.rough:
        error = error + unresolved_error(fn, result, mean.detach(), std.detach(), points.rough)
    if not points.seen:
        error = error + unseen_error(fn, result, mean.detach(), std.detach())
    return result._replace(error=error)


def _check_finite(fn: Callable[[Tensor], Tensor], result: Expectations, mean: Tensor, reach: Tensor) -> torch.dtype:
    """Refuse a function without finite moments; the floating dtype of what it returns."""
    with torch.no_grad():
        ends = torch.stack([fn(mean - reach), fn(mean + reach)])
        made = ends.dtype if ends.is_floating_point() else mean.dtype
        left = (ends.square() * density(mean.new_tensor(_REACH))).nan_to_num(posinf=torch.inf)
    if bool(result.mean.isnan().any()):
        raise NormPropError("the activation is NaN where the Gaussian has mass (a logarithm or a root of negative numbers?)")
    if not bool(result.second.isfinite().all()) or bool((left > 1e-6 * result.second.detach()).any()):
        raise NormPropError(
            "the activation grows too fast: its second moment under this Gaussian does not exist or overflows"
        )
    return made
