"""How much a network stretches small differences, and where β starts so that it doesn't too much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop.conversion.calibration import calibrate, samples
from normprop.conversion.converted import as_converted
from normprop.errors import NormPropError, NotFiniteError
from normprop.sites.site import Site

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
        model: any network of one input; evaluated in eval mode, and left in its own.
        data: a tensor of floating-point samples ``(N, …)``, or an iterable of such tensors or of tuples whose first entry is
            one (a DataLoader). Two of a batch make a pair; batches of one are left out.

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
    found = _ratio(model, samples(data, next((p.device for p in model.parameters()), torch.device("cpu"))))
    if found is None:
        raise NormPropError("the network gives every sample the same output.\nPass different samples.")
    return found


@torch.no_grad()
def _ratio(model: nn.Module, batches: Sequence[Tensor]) -> float | None:
    """`stretch` of a model, None where all outputs are the same."""
    batches = [x for x in batches if len(x) > 1]
    if not batches or not all(x.is_floating_point() for x in batches):
        raise NormPropError("stretch needs batches of two floating-point samples or more.")
    mode = model.training
    model.eval()
    near = far = 0.0
    try:
        for x in batches:
            here = list(_values(model(x)))
            there = [y.roll(1, 0) for y in here]
            step = max(_STEP, torch.finfo(x.dtype).eps ** 0.5)
            little = list(_values(model(x.lerp(x.roll(1, 0), step))))
            near += _squares(little, here) / step**2
            far += _squares(there, here)
    finally:
        model.train(mode)
    if not near + far < float("inf"):
        raise NotFiniteError("values behind the network are not finite.")
    return float((near / far) ** 0.5) if far else None


def init_beta_(model: nn.Module, data: Any, *, limit: float = 2.5, directions: int = 8, shrinkage: float = 0.0) -> float:
    """Start β of all sites of a fresh network where it doesn't `stretch` too much, and calibrate it.

    β = 0 has a ReLU cut off half of its inputs. With β above 0 it cuts off less, and layers are nearer to linear, which deep
    networks need and shallow ones don't (docs/results.md). The first of 0, ½ and 1 within the limit is taken, and where none
    is the one that stretches least; 0 where all outputs are still the same, as behind a last layer that starts at zero.

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
    converted = as_converted(model, "init_beta_")
    biases = [site.bias for site in converted.modules() if isinstance(site, Site) and site.bias is not None]
    if not biases:
        raise NormPropError("no site of the network has a β to start with.\nCall calibrate instead.")
    batches = samples(data, biases[0].device)
    tried: dict[float, float] = {}

    def start(beta: float) -> None:
        _fill(biases, beta)
        calibrate(converted, batches, directions=directions, shrinkage=shrinkage)

    for beta in _STARTS:
        start(beta)
        ratio = _ratio(converted, batches)
        if ratio is None or ratio <= limit:
            return beta
        tried[beta] = ratio
    least = min(tried, key=lambda beta: tried[beta])
    if least != beta:
        start(least)
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
