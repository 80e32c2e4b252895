"""Moments of one Gaussian through one activation."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normprop.activations.catalogue import canonical, expectations, torch_function
from normprop.activations.normal import Expectations, density, working_dtype
from normprop.activations.quadrature import Breakpoints, find_breakpoints, integrate, mean_and_variance
from normprop.errors import NormPropError

Activation = str | nn.Module | type[nn.Module] | Callable[..., Tensor]

__all__ = [
    "ActivationMoments", "activation_moments", "canonical", "check_elementwise", "function_moments", "mean_and_var",
    "module_moments", "moments",
]  # fmt: skip

_ORDERS = (12, 16, 20, 24)
_TARGET = 1e-12
_REACH = 37.0


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
    return _pack(expectations(name, m, s, parameters, order=10 if dtype == torch.float64 else 7), dtype)


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
    fn: Callable[[Tensor], Tensor], mean: float | Tensor, std: float | Tensor, points: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Mean and variance alone of `function_moments`, as exact as the result's dtype can show, and cheaper.

    Args:
        fn: takes float64 tensors of any shape.
        mean: number or tensor.
        std: number or tensor.
        points: ascending; where fn bends.
    """
    m, s, dtype = _prepare(mean, std)
    order, reach = (12, 14.0) if dtype == torch.float64 else (8, 10.0)
    average, var = mean_and_variance(fn, m, s, points, order=order, reach=reach)
    return average.to(dtype), var.to(dtype)


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
    if _eager(m) and _eager(s):
        if bool((~(s >= 0)).any()):
            raise NormPropError("std is negative or NaN")
        if bool(m.isnan().any()):
            raise NormPropError("mean is NaN")


def _eager(x: Tensor) -> bool:
    """Whether the values may be looked at: not while compiling, exporting, under a transform, or on the meta device."""
    if torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, nn.Parameter):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _pack(e: Expectations, dtype: torch.dtype) -> ActivationMoments:
    return ActivationMoments(*(x.to(dtype) for x in e))


def _adaptive(fn: Callable[[Tensor], Tensor], mean: Tensor, std: Tensor) -> Expectations:
    """Search for kinks over the range of all means and stds, then raise the order until two rules agree."""
    if mean.numel() == 0:
        return Expectations(*(torch.zeros_like(mean) for _ in range(6)))
    if not (_eager(mean) and _eager(std)):
        raise NormPropError(
            "an unknown callable is searched for kinks, which needs values: call find_breakpoints and integrate"
        )
    reach = _REACH * std.detach()
    low, high = float((mean.detach() - reach).min()), float((mean.detach() + reach).max())
    check_elementwise(fn, low, high)
    margin = 1e-3 * max(1.0, abs(low), abs(high))
    points = find_breakpoints(fn, low - margin, high + margin)
    for order in _ORDERS:
        result = integrate(fn, mean, std, points, order=order)
        size = result.second.detach() + torch.where(result.slope.isinf(), 0.0, result.slope).detach()
        if bool((result.error <= _TARGET * size).all()):
            break
    _check_finite(fn, result, mean.detach(), reach)
    return result if points.resolved else result._replace(error=10 * result.error)


def check_elementwise(fn: Callable[[Tensor], Tensor], low: float = -3.0, high: float = 3.0) -> None:
    """NormPropError if fn is random, or its value at one place depends on other places; tried between low and high."""
    probe = torch.linspace(max(low, -3.0), min(high, 3.0), 12, dtype=torch.float64) if low < 3 and high > -3 else None
    probe = torch.linspace(low, high, 12, dtype=torch.float64) if probe is None else probe
    try:
        with torch.no_grad():
            whole = fn(probe.clone())
            grid = fn(probe.reshape(3, 4).clone())
            part = fn(probe[7:9].clone())
            again = fn(probe.clone())
    except NormPropError:
        raise
    except Exception as reason:
        raise NormPropError(f"the activation cannot be applied to a float64 tensor of any shape: {reason}") from reason
    if not isinstance(whole, Tensor) or whole.shape != probe.shape or grid.shape != (3, 4):
        raise NormPropError("the activation changes the shape of its input: it is not elementwise")
    if not torch.equal(whole.nan_to_num(), again.nan_to_num()):
        raise NormPropError("the activation is random: put it into eval mode, or pass its mean function")
    same = (whole[7:9], part), (whole.reshape(3, 4), grid)
    if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True) for a, b in same):
        raise NormPropError("the activation's output at one place depends on other places: it is not elementwise")


def _check_finite(fn: Callable[[Tensor], Tensor], result: Expectations, mean: Tensor, reach: Tensor) -> None:
    with torch.no_grad():
        ends = torch.stack([fn(mean - reach), fn(mean + reach)])
        left = (ends.square() * density(mean.new_tensor(_REACH))).nan_to_num(posinf=torch.inf)
    if bool(result.mean.isnan().any()):
        raise NormPropError("the activation is NaN where the Gaussian has mass (a logarithm or a root of negative numbers?)")
    if not bool(result.second.isfinite().all()) or bool((left > 1e-6 * result.second.detach()).any()):
        raise NormPropError(
            "the activation grows too fast: its second moment under this Gaussian does not exist or overflows"
        )
