"""How much a network stretches small differences, and where β starts so that it doesn't too much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop.conversion.calibration import calibrate, samples
from normprop.conversion.lane import converted_lane, lane_of, sites_of
from normprop.conversion.measuring_mode import measuring
from normprop.errors import NormPropError, NotFiniteError
from normprop.graph.example_inputs import Inputs, required

# How far towards the next sample a difference is small; half precision needs larger steps.
_STEP = 1e-3
# What β may start at, the first that does: above 1 networks without skips are next to linear.
_STARTS = (0.0, 0.5, 1.0)


def stretch(model: nn.Module, data: Any) -> float:
    """How many times as much a network stretches small differences as large ones, at the start of training about 1 to 4.

    That is lim ‖f(x + s (x' − x)) − f(x)‖ / s ‖f(x') − f(x)‖ for s → 0, root mean square over pairs of samples: 1 for a
    linear network, more the more its function folds between two samples. A standardised layer and the activation φ behind it
    stretch by γ √(E[φ'(u)²]/Var φ(u)), u ~ N(β, γ²), on average over directions (mean-field theory, Schoenholz et al. 2017,
    arXiv 1611.01232); skips take it back. The limit is taken at s = 1e-3, in half precision at the root of its epsilon.

    Args:
        model: any network; evaluated in eval mode, and left in its own.
        data: a tensor of samples ``(N, …)``, or an iterable of batches as for `calibrate`. Two samples of a batch make a
            pair; batches of one are left out. Inputs that are no floating-point numbers stay as they are.

    Returns:
        The ratio.

    Raises:
        NormPropError: no batch of two samples or more, or integers; no data; an output that doesn't depend on them.
        NotFiniteError: values that are not finite.

    Example:
        >>> import torch, normprop
        >>> x = torch.randn(64, 4)
        >>> round(normprop.stretch(torch.nn.Linear(4, 8), x), 2)
        1.0
        >>> layers = [torch.nn.Linear(4, 512), torch.nn.ReLU(), torch.nn.Linear(512, 8)]
        >>> normprop.stretch(torch.nn.Sequential(*layers), x) > 1.05
        True
    """
    lane = lane_of(model)
    example = Inputs((None,) * len(required(model))) if lane is None else lane.example
    found = _ratio(model, samples(data, next((p.device for p in model.parameters()), torch.device("cpu")), example, model))
    if found is None:
        raise NormPropError("the network gives every sample the same output.\nPass different samples.")
    return found


@torch.no_grad()
def _ratio(model: nn.Module, batches: Sequence[Inputs]) -> float | None:
    """`stretch` of a model, None where all outputs are the same."""
    pairs = [[t for t in batch.tensors() if t.is_floating_point() and t.dim()] for batch in batches]
    batches = [batch for batch, floats in zip(batches, pairs, strict=True) if floats and len(floats[0]) > 1]
    if not batches or not all(pairs):
        raise NormPropError("stretch needs batches of two floating-point samples or more.")
    near = far = 0.0
    run: Any = lambda inputs: list(_values(model(*inputs.args, **inputs.kwargs)))
    with measuring(model):
        for batch in batches:
            floats = [t for t in batch.tensors() if t.is_floating_point()]
            step = max(_STEP, torch.finfo(floats[0].dtype).eps ** 0.5)
            here = run(batch)
            there = [y.roll(1, 0) for y in here]
            little = run(batch.map(lambda t, s=step: t.lerp(t.roll(1, 0), s) if t.is_floating_point() and t.dim() else t))
            near += _squares(little, here) / step**2
            far += _squares(there, here)
    if not near + far < float("inf"):
        raise NotFiniteError("values behind the network are not finite.")
    return float((near / far) ** 0.5) if far else None


def init_beta_(model: nn.Module, data: Any, *, limit: float = 2.5, directions: int = 8, shrinkage: float = 0.0) -> float:
    """Start β of all sites of a fresh network where it doesn't `stretch` too much, and calibrate it.

    β = 0 has a ReLU cut off half of its inputs. With β above 0 it cuts off less, and layers are nearer to linear, which deep
    networks need and shallow ones don't (docs/laboratory.md). The first of 0, ½ and 1 within the limit is taken, and where
    none is the one that stretches least; 0 where all outputs are still the same, as behind a last layer that starts at zero.

    Args:
        model: a network that `convert` made, before training; β and the constants are changed in place. Gains stay.
        data: as for `calibrate`, which see also for `directions` and `shrinkage`; a few hundred samples.
        limit: the most that the network may stretch.

    Returns:
        The value of β, the same for all channels.

    Raises:
        NormPropError: the model is not a converted one, has no site with a β, or what `calibrate` and `stretch` refuse.
        NotFiniteError: values that are not finite, of the data or in the network.

    Example:
        >>> import torch, normprop
        >>> layers = [m for _ in range(16) for m in (torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU())]
        >>> net = normprop.convert(torch.nn.Sequential(*layers))
        >>> normprop.init_beta_(net, torch.randn(256, 64)) > 0
        True
    """
    lane = converted_lane(model, "init_beta_")
    biases = [site.bias for site in sites_of([lane]) if site.bias is not None]
    if not biases:
        raise NormPropError("no site of the network has a β to start with.\nCall calibrate instead.")
    batches = samples(data, biases[0].device, lane.example, model)
    beta = search_beta_(model, batches, biases, limit)
    if directions:
        calibrate(model, batches, directions=directions, shrinkage=shrinkage)
    return beta


def search_beta_(model: nn.Module, batches: Sequence[Inputs], biases: Sequence[nn.Parameter], limit: float = 2.5) -> float:
    """`init_beta_` with no directions: the function at the start doesn't depend on them.

    Args:
        model: see `init_beta_`.
        batches: the samples.
        biases: β of all sites.
        limit: see `init_beta_`.
    """
    tried: dict[float, float] = {}
    for beta in _STARTS:
        _fill(biases, beta)
        calibrate(model, batches, directions=0)
        ratio = _ratio(model, batches)
        if ratio is None or ratio <= limit:
            return beta
        tried[beta] = ratio
    least = min(tried, key=lambda beta: tried[beta])
    if least != beta:
        _fill(biases, least)
        calibrate(model, batches, directions=0)
    return least


@torch.no_grad()
def _fill(biases: Sequence[nn.Parameter], value: float) -> None:
    for bias in biases:
        bias.fill_(value)


def _values(output: Any) -> Iterator[Tensor]:
    """Tensors of an output, whatever its structure."""
    return (y.cpu().double() for y in pytree.tree_leaves(output) if isinstance(y, Tensor) and y.is_floating_point())


def _squares(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Squared length of a difference."""
    return sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))
