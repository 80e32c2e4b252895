"""Unit-length filters and adaptive gradient clipping, as functions and as hooks of any torch optimizer.

The paper's schedule, the rate halved at intervals, is torch's `StepLR(optimizer, step_size, gamma=0.5)`.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from normprop.errors import NormPropError
from normprop.nn.filters import filter_norms, filter_view


class Filters(NamedTuple):
    """A weight and the layout of its filters (see `filter_view`)."""

    weight: Tensor
    channel_dim: int = 0
    groups: int = 1


# What optimizers call running means of gradients, of their squares (or sums), and of their magnitudes.
FIRST_MOMENTS = ("momentum_buffer", "exp_avg", "grad_avg")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
MAXIMA = ("exp_inf",)
# Whose steps have the same length whatever the gradient's.
_ORTHOGONAL = ("Muon",)


@torch.no_grad()
def project_unit_norm_(model_or_parameters: torch.nn.Module | Tensor | Iterable[Tensor], *, eps: float = 1e-7) -> int:
    """Rescale filters to unit length in place; the number of filters.

    W_i ← W_i / ‖W_i‖, the projection after every step of Normalization Propagation (Arpit et al., 2016, §4). It
    doesn't change what a normalised layer computes. Filters shorter than `eps` have no direction and stay as they are.

    Args:
        model_or_parameters: A model, or parameters. Of a model that `normprop.convert` made the weights in front of its
            sites take part; of any other every module with a method `filters()`. Of parameters those with two dimensions
            or more do: their filters are `weight[i]`, so give layers, not weights, of transposed convolutions.
        eps: The length below which a filter counts as zero.

    >>> weight = torch.tensor([[3.0, 4.0]])
    >>> project_unit_norm_([weight]), weight
    (1, tensor([[0.6000, 0.8000]]))
    """
    filters = list(_filters(model_or_parameters))
    return sum(norms.numel() for norms in _rescale_(filters, eps))


class UnitNormProjection:
    """Keeps filters at unit length: rescales them after every step of `optimizer`, and once now.

    The gradient of a function that doesn't feel the length of W is perpendicular to W, so each step makes filters
    longer and the next ones turn them less. On the unit sphere the rate keeps its meaning.

    With `tangent`, first moments m (SGD's `momentum_buffer`, Adam's `exp_avg`) go along to the new point W' = W/‖W‖::

        m ← ‖W‖ (m − (m·W') W')

    Why the factor: a tangent step along m turns W by θ with cos θ = 1/‖W‖. Taking the radial part away leaves m cos θ,
    and ‖W‖ restores its length: parallel transport along the great circle. Seen from the gradients that m is made of,
    those of a function without a feeling for length obey ∇f(W/‖W‖) = ‖W‖ ∇f(W). Second moments stay, as their gradients
    were all taken at unit length; only the first projection, here, scales those that exist by ‖W‖².

    It keeps no state: neither `optimizer.state_dict()` nor the model's has anything of it.

    Args:
        optimizer: Any torch optimizer.
        model: As for `project_unit_norm_`. Without a model it is the parameters with two dimensions or more in the
            groups of `optimizer` with `unit_norm=True`, or in all groups if none has that key.
        tangent: Whether first moments are carried along.
        eps: The length below which a filter counts as zero.

    Raises:
        NormPropError: There is nothing to project.

    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> projection = UnitNormProjection(optimizer)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> [f"{norm:.4f}" for norm in model.weight.norm(dim=1).tolist()]
    ['1.0000', '1.0000', '1.0000']
    """

    def __init__(
        self, optimizer: Optimizer, model: torch.nn.Module | None = None, *, tangent: bool = True, eps: float = 1e-7
    ) -> None:
        self.model = model
        self.tangent = tangent
        self.eps = eps
        if self._project(optimizer, FIRST_MOMENTS, SECOND_MOMENTS) == 0:
            raise NormPropError(
                "UnitNormProjection found no filters to keep at unit length.\n"
                "Give a model with normalised layers, or mark groups of the optimizer with unit_norm=True."
            )
        self._handle = optimizer.register_step_post_hook(self._hook)

    def remove(self) -> None:
        """Leave the optimizer alone from now on."""
        self._handle.remove()

    def _hook(self, optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        self._project(optimizer, FIRST_MOMENTS, ())

    @torch.no_grad()
    def _project(self, optimizer: Optimizer, first: tuple[str, ...], second: tuple[str, ...]) -> int:
        filters = list(_filters(_marked(optimizer) if self.model is None else self.model))
        norms = _rescale_(filters, self.eps)
        if self.tangent:
            states = [optimizer.state.get(item.weight, {}) for item in filters]
            carried = list(zip(filters, norms, states, strict=True))
            _transport_([(state[key], item, norm) for item, norm, state in carried for key in first if _has(state, key)])
            for item, norm, state in carried:
                for moment in (state[key] for key in second if _has(state, key)):
                    filter_view(moment, item.channel_dim, item.groups)[0].mul_(norm.square())
        return sum(norm.numel() for norm in norms)


@torch.no_grad()
def clip_grad_adaptive_(parameters: Tensor | Iterable[Tensor], clip: float = 0.05, *, eps: float = 1e-3) -> Tensor:
    """Clip gradients in place by the size of what they change; the fraction of units that were clipped.

    Adaptive gradient clipping (Brock et al., 2021, eq. 3): the gradient G_i of unit i is scaled so that::

        ‖G_i‖ ≤ clip · max(‖W_i‖, eps)

    A unit is a filter `weight[i]` of a parameter with two dimensions or more. A gain or a bias is one unit as a whole,
    as its authors have it: elementwise, one whose elements start at zero could move only eps · clip a step in each.
    They leave out the final linear layer; so may you.

    Args:
        parameters: As for `torch.nn.utils.clip_grad_norm_`; those without a gradient are skipped.
        clip: λ, .01 to .1 in practice.
        eps: The length that shorter units are given, so that zero-initialised ones can move.

    Returns:
        The clipped fraction, a scalar tensor on the device of the first gradient; reading it is what synchronises.

    Raises:
        NormPropError: `clip` or `eps` isn't positive.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    >>> weight.grad = torch.tensor([[0.0, 1.0], [0.0, 0.01]])
    >>> clip_grad_adaptive_([weight], clip=0.1), weight.grad
    (tensor(0.5000), tensor([[0.0000, 0.5000],
            [0.0000, 0.0100]]))
    """
    if not (clip > 0 and eps > 0):
        raise NormPropError(f"clip is {clip} and eps is {eps}.\nBoth have to be positive.")
    return _clip_units([(p, clip) for p in ([parameters] if isinstance(parameters, Tensor) else parameters)], eps)


def _clip_units(parameters: Iterable[tuple[Tensor, float]], eps: float, grad_scale: Tensor | None = None) -> Tensor:
    """`clip_grad_adaptive_` for parameters with a λ each, and gradients that are still multiplied by something."""
    given = [(p.detach(), p.grad, clip) for p, clip in parameters if p.grad is not None and p.numel()]
    if not given:
        return torch.zeros(())
    pairs = [(weight, gradient) for weight, gradient, _ in given]
    bounds = [_unit_norms(weight) for weight, _ in pairs]
    torch._foreach_clamp_min_(bounds, eps)
    torch._foreach_mul_(bounds, [clip for *_, clip in given])
    if grad_scale is not None:
        bounds = [bound * grad_scale.to(bound.device) for bound in bounds]
    norms = [_unit_norms(gradient) for _, gradient in pairs]
    count = sum(norm.numel() for norm in norms)
    device = norms[0].device
    clipped = torch.stack([(norm > bound).sum().to(device) for norm, bound in zip(norms, bounds, strict=True)]).sum()
    torch._foreach_maximum_(norms, bounds)  # what is within its bound is scaled by exactly one
    torch._foreach_div_(bounds, norms)
    torch._foreach_mul_(
        [gradient for _, gradient in pairs], [b.to(g.dtype) for b, (_, g) in zip(bounds, pairs, strict=True)]
    )
    return clipped / count


class AdaptiveGradientClipping:
    """Calls `clip_grad_adaptive_` on all parameters of `optimizer` before each of its steps.

    `fraction` is what the last call returned. Groups with `clip_adaptive=False` are left out: the output layer, if you
    follow Brock et al. (2021). Gradients are clipped after a closure has computed them, and as what they are where a
    `GradScaler` leaves it to the optimizer to unscale them.

    A clipped step of SGD without momentum changes a unit by lr · clip of its length, the more the higher the rate. With
    `up_to` this grows no further above that rate::

        ‖G_i‖ ≤ clip · min(1, up_to / lr) · max(‖W_i‖, eps)

    so that one `clip` does for all rates, and higher ones cannot turn filters faster than what is known of their inputs
    holds.

    Args:
        optimizer: Any torch optimizer.
        clip: λ, as for `clip_grad_adaptive_`.
        eps: As there.
        up_to: The learning rate from which on clip falls as 1/lr; by default it never does.

    Raises:
        NormPropError: `clip`, `eps` or `up_to` isn't positive.

    >>> weight = torch.nn.Parameter(torch.ones(2, 2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> clipping = AdaptiveGradientClipping(optimizer, clip=0.1)
    >>> (100 * weight.sum()).backward()
    >>> optimizer.step()
    >>> weight.norm(dim=1), clipping.fraction
    (tensor([1.2728, 1.2728], grad_fn=<LinalgVectorNormBackward0>), tensor(1.))
    """

    def __init__(self, optimizer: Optimizer, clip: float = 0.05, *, eps: float = 1e-3, up_to: float = math.inf) -> None:
        if not up_to > 0:
            raise NormPropError(f"up_to is {up_to}.\nUse a learning rate above 0.")
        self.clip = clip
        self.eps = eps
        self.up_to = up_to
        self.fraction = torch.zeros(())
        clip_grad_adaptive_([], clip, eps=eps)  # refuses a bad clip or eps here and not at the first step
        self._handle = optimizer.register_step_pre_hook(self._hook)

    def remove(self) -> None:
        """Leave the optimizer's gradients alone from now on."""
        self._handle.remove()

    def _hook(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure") if len(args) < 2 else args[1]  # the first is the optimizer
        if closure is None:
            self._clip(optimizer)
            return None

        def clipped() -> Any:
            loss = closure()
            self._clip(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": clipped}

    def _clip(self, optimizer: Optimizer) -> None:
        groups = [group for group in optimizer.param_groups if group.get("clip_adaptive", True)]
        clips = [self.clip / max(1.0, float(group["lr"]) / self.up_to) for group in groups]
        pairs = [(p, clip) for group, clip in zip(groups, clips, strict=True) for p in group["params"]]
        self.fraction = _clip_units(pairs, self.eps, getattr(optimizer, "grad_scale", None))


def clips(optimizer: Optimizer, clip: float | None) -> tuple[float, float]:
    """λ of adaptive clipping that an optimizer's gradients need, and the rate from which on it falls; λ = 0 for none.

    Args:
        optimizer: Any torch optimizer.
        clip: λ, or None for one that suits the optimizer.

    >>> clips(torch.optim.SGD([torch.zeros(2)], lr=0.1), None), clips(torch.optim.AdamW([torch.zeros(2)]), None)
    ((0.05, 0.1), (0.05, inf))
    """
    if type(optimizer).__name__ in _ORTHOGONAL:
        return clip or 0.0, math.inf
    adapts = any(name in group for group in optimizer.param_groups for name in ("betas", "alpha", "rho", "lr_decay"))
    return 0.05 if clip is None else clip, math.inf if adapts else 0.1


def _filters(source: torch.nn.Module | Tensor | Iterable[Tensor]) -> Iterator[Filters]:
    """The weights with filters, each once: a weight that layers share must not be rescaled twice."""
    if isinstance(source, torch.nn.Module):
        found = (item for module in source.modules() for item in _filters_of(module))
    else:
        found = (Filters(tensor) for tensor in ([source] if isinstance(source, Tensor) else source) if tensor.ndim > 1)
    seen = set[int]()
    for item in found:
        if id(item.weight) not in seen:
            seen.add(id(item.weight))
            yield item


def _filters_of(module: torch.nn.Module) -> Iterator[Filters]:
    """The filters that a module itself normalises."""
    if hasattr(module, "filters"):
        yield from (Filters(*item) for item in cast(Any, module).filters())
    for hook in module._forward_pre_hooks.values():  # what convert leaves on its result
        for entry in cast(Any, hook).lane.filters if getattr(hook, "begins", False) else ():
            yield Filters(module.get_parameter(entry["weight"]), entry["channel_dim"], entry["groups"])


def _marked(optimizer: Optimizer) -> list[Tensor]:
    groups = optimizer.param_groups
    if any("unit_norm" in group for group in groups):
        groups = [group for group in groups if group.get("unit_norm", False)]
    return [parameter for group in groups for parameter in group["params"]]


def _has(state: dict[str, Any], key: str) -> bool:
    return isinstance(state.get(key), Tensor)  # SGD keeps None before its first step


def _rescale_(filters: list[Filters], eps: float) -> list[Tensor]:
    """Give filters unit length; what they were divided by, shaped as in `filter_view`, 1 if shorter than `eps`."""
    if not filters:
        return []
    views = [filter_view(item.weight, item.channel_dim, item.groups) for item in filters]
    norms = [filter_norms(view, inside) for view, inside in views]
    norms = [torch.where(norm > eps, norm, 1.0) for norm in norms]
    torch._foreach_div_([view for view, _ in views], norms)
    return norms


def _transport_(moments: list[tuple[Tensor, Filters, Tensor]]) -> None:
    """m ← ‖W‖ (m − (m·W') W') for `(m, filters of W', ‖W‖)`."""
    if not moments:
        return
    weights = [filter_view(item.weight, item.channel_dim, item.groups)[0] for _, item, _ in moments]
    views = [filter_view(moment, item.channel_dim, item.groups) for moment, item, _ in moments]
    vectors = [view for view, _ in views]
    products = torch._foreach_mul(vectors, weights)
    radial = [product.sum(inside, keepdim=True) for product, (_, inside) in zip(products, views, strict=True)]
    torch._foreach_addcmul_(vectors, weights, radial, value=-1)
    torch._foreach_mul_(vectors, [norm.to(vector.dtype) for vector, (_, _, norm) in zip(vectors, moments, strict=True)])


def _unit_norms(tensor: Tensor) -> Tensor:
    """Norms of the units of `clip_grad_adaptive_`, shaped to multiply `tensor` with."""
    if tensor.ndim < 2:
        return filter_norms(tensor, tuple(range(tensor.ndim)))
    return filter_norms(*filter_view(tensor))
