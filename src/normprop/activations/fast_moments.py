"""Mean and variance after an activation in one autograd function: what a moment lane needs of `activation_moments`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normprop.activations.activation_moments import activation_moments
from normprop.activations.catalogue import outline
from normprop.activations.compiled_curves import curve_moments, native_curve
from normprop.activations.panels import DOUBLE, SINGLE, Panels, lane_panels
from normprop.activations.small_variance import continued
from normprop.double_backward import gradients_again
from normprop.native.operands import handles, is_traced
from normprop.native.structures import Curve
from normprop.precision import working_dtype

# Nodes of one pass on a CPU: their vectors stay in the cache, and the allocator has blocks of that size at hand.
_TOGETHER = 24_000

Plain = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def lane_moments(name: str, mean: Tensor, var: Tensor, parameters: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """E f and Var f of a named activation for u ~ N(mean, var), as exact as the dtype of a lane can show.

    Smooth activations and continuous piecewise polynomials take one autograd function, compiled where it can be, exact to
    1e-10 of the natural scale (single precision: 1e-6). Everything else takes `activation_moments`, as do all of them under
    `torch.compile`, `torch.export` and the transforms of `torch.func`, and where they are differentiated twice.

    Args:
        name: as for `activation_moments`.
        mean: float tensor, any shape.
        var: float tensor that broadcasts against it, not negative.
        parameters: of the activation, named as in torch.nn.functional.

    Returns:
        Both of the broadcast shape, in the promoted dtype (float32 for half precision).

    >>> first, second = lane_moments("silu", torch.zeros(1), torch.ones(1), {})
    >>> print(f"{float(first):.6f} {float(second):.6f}")
    0.206621 0.313083
    """

    plain = functools.partial(_plain, name, parameters)
    panels = _panels(name, mean, var, parameters)
    if panels is None:
        return plain(mean, var)
    first, second = _LaneMoments.apply(
        *torch.broadcast_tensors(mean, var), panels, _curve(name, mean, var, parameters), plain
    )
    return first, second


def _curve(name: str, mean: Tensor, var: Tensor, parameters: Mapping[str, Any]) -> Curve | None:
    """The activation for the compiled functions, if they take it and such moments."""
    if not handles((mean, var), mean.dtype):
        return None
    return native_curve(name, tuple(sorted(parameters.items())), mean.dtype == torch.float64)


def _panels(name: str, mean: Tensor, var: Tensor, parameters: Mapping[str, Any]) -> Panels | None:
    """Panels for an activation where one function over them serves; None where `activation_moments` is to."""
    if not (eager(mean) and eager(var)) or any(isinstance(value, Tensor) for value in parameters.values()):
        return None
    exact = torch.promote_types(mean.dtype, var.dtype) == torch.float64
    return lane_panels(name, tuple(sorted(parameters.items())), DOUBLE if exact else SINGLE)


@torch.no_grad()
def mean_square_slope(name: str, mean: Tensor, var: Tensor, parameters: Mapping[str, Any]) -> Tensor | None:
    """``E f'(u)²`` of a smooth activation for u ~ N(mean, var), over the nodes of `lane_moments`; None for any other.

    Tokens have moments of their own at every position, and the bounds that `activation_moments` states take many more nodes.
    Exact to 1e-9 of the slope's scale, on nodes that are placed for f (single precision: 1e-6).

    Args:
        name: as for `activation_moments`.
        mean: float tensor, any shape.
        var: float tensor that broadcasts against it, not negative.
        parameters: of the activation, named as in torch.nn.functional.

    >>> found = mean_square_slope("gelu", torch.zeros(1), torch.ones(1), {})
    >>> print(f"{float(found):.6f} {float(activation_moments('gelu', 0.0, 1.0).slope):.6f}")
    0.455851 0.455851
    """
    panels = _panels(name, mean, var, parameters)
    if panels is None or panels.kinked:
        return None
    mean, var = torch.broadcast_tensors(mean, var)
    m, v = (t.reshape(-1).to(working_dtype(mean.device)) for t in (mean, var))
    far = panels.smallest(torch.finfo(m.dtype).eps)[1]
    std = v.sqrt().clamp(min=far)
    passes = _passes(panels, m)
    parts = [_mean_square_slope(panels, *few) for few in zip(m.chunk(passes), std.chunk(passes), strict=True)]
    return torch.cat(parts).reshape(mean.shape).to(torch.promote_types(mean.dtype, var.dtype))


def _passes(panels: Panels, mean: Tensor) -> int:
    """In how many parts the nodes of so many means are computed."""
    return max(1, -(-mean.numel() * panels.count // _TOGETHER)) if mean.device.type == "cpu" else 1


def _mean_square_slope(panels: Panels, mean: Tensor, std: Tensor) -> Tensor:
    z, weight = panels.nodes(mean, std)
    return weight.mul_(panels.slope(torch.addcmul(mean.unsqueeze(1), std.unsqueeze(1), z)).square()).sum(-1)


def _plain(name: str, parameters: Mapping[str, Any], mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The moments of `activation_moments`, with the derivatives of the limit where there is no variance."""

    def evaluate(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        found = activation_moments(name, mean, std, **parameters)
        return found.mean, found.var

    shapes = (p.shape for p in parameters.values() if isinstance(p, Tensor))
    shape = torch.broadcast_shapes(mean.shape, var.shape, *shapes)
    dtype = torch.promote_types(torch.promote_types(mean.dtype, var.dtype), torch.float32)
    m, v = mean.to(dtype).expand(shape), var.to(dtype).expand(shape)
    f = outline(name, parameters)
    center = f.value(m if f.jumping else m.detach()).to(dtype)
    rounding = torch.finfo(working_dtype(mean.device)).eps
    return continued(evaluate, m, v, center, kinked=f.kinked, jumping=f.jumping, rounding=rounding)


def eager(x: Tensor) -> bool:
    """Whether no compiler, transform or mode (fake tensors) looks on, and no subclass has operations of its own."""
    if is_traced() or torch._C._len_torch_dispatch_stack():
        return False
    return type(x) in (Tensor, nn.Parameter)


class _LaneMoments(torch.autograd.Function):
    """E f and Var f for u = m + s z, s = √v, with the derivatives by Stein's identities (derived; f' in the weak sense).

        ∂E/∂m = E f'           ∂Var/∂m = 2 Cov(f, f')
        ∂E/∂v = E f'z / (2s)   ∂Var/∂v = E (f − E f) f'z / s

    All are sums over the same nodes. Differentiated again, the backward is that of `activation_moments`.
    """

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, panels: Panels, curve: Curve | None, plain: Plain
    ) -> tuple[Tensor, Tensor]:
        m, v = mean.reshape(-1), var.reshape(-1)
        found = curve_moments(curve, m, v) if curve else _all_sums(panels, m, v, slopes=any(ctx.needs_input_grad))
        found = [x.reshape(mean.shape) for x in found]
        ctx.save_for_backward(mean, var, *found[2:])
        ctx.plain = plain
        dtype = torch.promote_types(mean.dtype, var.dtype)
        dtype = dtype if dtype == torch.float64 else torch.float32
        return found[0].to(dtype), found[1].to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        mean, var, *slopes = ctx.saved_tensors
        if torch.is_grad_enabled():
            by_mean, by_var = gradients_again(lambda given: ctx.plain(*given), (mean, var), grads)
            return by_mean, by_var, None, None, None
        first, second = grads
        by_mean = torch.addcmul(first * slopes[0], second, slopes[2])
        by_var = torch.addcmul(first * slopes[1], second, slopes[3])
        return by_mean.to(mean.dtype), by_var.to(var.dtype), None, None, None


def _all_sums(panels: Panels, mean: Tensor, var: Tensor, *, slopes: bool) -> list[Tensor]:
    """`_sums` of any number of moments in the precision of sums, some at a time."""
    work = working_dtype(mean.device)
    m, v = mean.to(work), var.to(work)
    passes = _passes(panels, m)
    parts = [_sums(panels, *few, slopes) for few in zip(m.chunk(passes), v.chunk(passes), strict=True)]
    return parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]


def _sums(panels: Panels, mean: Tensor, var: Tensor, slopes: bool) -> list[Tensor]:
    """E f and Var f, and if wanted ∂E/∂m, ∂E/∂v, ∂Var/∂m and ∂Var/∂v, ``(n,)`` each.

    The value at the mean is taken off f, then E f, and E f' off f', so that little cancels where s is small. Below
    s = ε^p (|m| + |f(m)|) + ε^{2/3} the sums are those at that s: there derivatives are at their limits, Var f goes down
    with s², and E f − f(m) with s², or with s where f has a kink. With p = 1/3, or 1/2 at a kink, rounding and what the
    limits leave out are equally small. At s = 0 a kink makes ∂E/∂v infinite: it is 0.
    """
    center = panels.center(mean)
    near, far = panels.smallest(torch.finfo(mean.dtype).eps)
    smallest = (mean.abs() + center.abs()).mul_(near).add_(far)
    root = var.sqrt()
    std = torch.maximum(root, smallest)
    ratio = root / std
    z, weight = panels.nodes(mean, std)
    u = torch.addcmul(mean.unsqueeze(1), std.unsqueeze(1), z)
    f = panels.value(u).sub_(center.unsqueeze(1))
    weighted = weight * f
    average = weighted.sum(-1)
    f.sub_(average.unsqueeze(1))
    second = torch.mul(weight, f, out=weighted).mul_(f).sum(-1)
    shrunk = ratio.square()
    found = [torch.addcmul(center, average, ratio if panels.kinked else shrunk), second * shrunk]
    if not slopes:
        return found
    slope = panels.slope(u)
    expected = torch.mul(weight, slope, out=weighted).sum(-1)
    slope.sub_(expected.unsqueeze(1))
    weight.mul_(slope)
    along = torch.mul(weight, f, out=weighted).sum(-1)
    weight.mul_(z)
    bend = weight.sum(-1)
    # E (f − E f) z = s E f', so that the part of f' that was taken off comes back as its square.
    tilt = weight.mul_(f).sum(-1)
    return [
        *found,
        expected,
        torch.where(var > 0, bend / (2 * std), 0.0),
        2 * along * shrunk,
        torch.addcmul(tilt / std, expected, expected),
    ]
