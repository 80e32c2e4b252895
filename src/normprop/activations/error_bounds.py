"""What moments may be off by where a function is not resolved, or not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normprop.activations.normal import Expectations

Function = Callable[[Tensor], Tensor]

_SAMPLES = 48  # of a panel
_PROBES = 4096  # of a Gaussian
# Extremes between samples lie a little further out.
_SLACK = 1.25


def unresolved_error(
    fn: Function, found: Expectations, mean: Tensor, std: Tensor, panels: Sequence[tuple[float, float]]
) -> Tensor:
    """A bound on the errors of `found` for a function that may vary within panels as it likes.

    True and computed average over a panel both lie between the function's extremes there: they differ by its range times
    the mass of the panel at most.

    Args:
        fn: takes float64 tensors of any shape.
        found: moments by quadrature.
        mean: of the Gaussians, any shape.
        std: theirs.
        panels: those that are not resolved.
    """
    low, high = mean.new_tensor(panels).reshape(-1, 2).unbind(1)
    inside = torch.linspace(0.0, 1.0, _SAMPLES, dtype=low.dtype, device=low.device)
    u = low[:, None] + (high - low)[:, None] * inside
    z = [(end.reshape(-1, *[1] * mean.dim()) - mean) / std.clamp_min(1e-300) for end in (low, high)]
    mass = torch.special.ndtr(z[1]) - torch.special.ndtr(z[0])
    return _bound(found, [_spread(x) @ mass.reshape(len(mass), -1) for x in _values(fn, u)], mean.shape)


def unseen_error(fn: Function, found: Expectations, mean: Tensor, std: Tensor) -> Tensor:
    """What a function may hide that computes outside of torch's operations, judged by as many probes as can be afforded.

    The averages over evenly likely places differ from those of the quadrature by what was found of the hidden; something
    narrower than the distance of two places is taken to be as large as the function is elsewhere, or 1.

    Args:
        fn: takes float64 tensors of any shape.
        found: moments by quadrature.
        mean: of the Gaussians, any shape.
        std: theirs.
    """
    place = (torch.arange(_PROBES, dtype=mean.dtype, device=mean.device) + 0.5) / _PROBES
    z = torch.special.ndtri(place).reshape(-1, *[1] * mean.dim())
    u = mean + std * z
    names = ("mean", "second", "slope")
    errors = []
    for name, x in zip(names, _values(fn, u), strict=True):
        seen = (x.mean(0) - getattr(found, name)).abs()
        errors.append((seen + (x.amax(0) - x.amin(0)).clamp(min=1.0) / _PROBES * _SLACK).flatten())
    return _bound(found, errors, mean.shape)


def _values(fn: Function, u: Tensor) -> list[Tensor]:
    """f, f² and f'²; what isn't finite counts as 0."""
    with torch.enable_grad():
        points = u.detach().requires_grad_()
        value = fn(points.reshape(-1)).reshape(u.shape).to(torch.float64)
        slope = torch.autograd.grad(value.sum(), points)[0] if value.requires_grad else torch.zeros_like(u)
    return [x.detach().nan_to_num(0.0, 0.0, 0.0) for x in (value, value.square(), slope.square())]


def _spread(x: Tensor) -> Tensor:
    return _SLACK * (x.amax(1) - x.amin(1))


def _bound(found: Expectations, errors: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """The largest of the errors of mean, variance, second moment and slope."""
    first, second, slope = (e.reshape(shape) for e in errors)
    spread = second + 2 * found.mean.detach().abs() * first + first.square()
    slope = torch.where(found.slope.isinf(), 0.0, slope)
    return torch.stack([first, second, spread, slope.nan_to_num(posinf=torch.inf)]).amax(0)
