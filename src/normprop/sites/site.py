"""Normalisation sites: what takes BatchNorm's place, as differentiable arithmetic on parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.native.operands import is_traced
from normprop.precision import full_precision, wide
from normprop.sites.engine import scales
from normprop.sites.reference import Scale, parts, plain_statistics
from normprop.sites.rows import CENTER_STEPS, Form, Operands

# What `Site.record` begins with in the paper's form.
PRINTED = 2
# Of fingerprints in units of 2⁻³²: machines round differently.
_TOLERANCE = 1 << 8


class Site(nn.Module):
    """What stands in a BatchNorm's place: its γ and β, and constants that calibration sets.

    Behind a layer that runs with the effective weight and bias of this site, the forward is the identity; elsewhere it is
    one multiplication and one addition per channel. Modules inside (the activation of a norm-act module) run after it.

    Attributes:
        weight: γ, ``(C,)``, or None.
        bias: β, ``(C,)``, or None.
        shift: d, ``(C,)``, constant: what calibration adds to the computed mean, in units of √V. ``(calls, C)`` if the site
            is used several times in one forward.
        scale: k, of the same shape, constant: what calibration multiplies the computed variance with.
        directions: U, constant, or None: along what the input of the layer before the site varies most, as calibration
            found it, ``(groups · R, I/groups, …)``, as `Operands` has it; zeros before. ``(calls, groups · R, …)`` for
            several calls.
        record: five numbers, constant, so that a state_dict holds them: how much of their mean is taken from the filters of
            the layer before, from 0 to 1, or 2 in the paper's form; and four bytes that tell apart moments of the site's
            input, see `fingerprint`.
        path: of the site in its network.
        lane: what computes effective weights; None for a site of no network.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    directions: nn.Parameter | None

    def __init__(
        self, weight: nn.Parameter | None, bias: nn.Parameter | None, shift: Tensor, scale: Tensor, *, center: float = 0.0
    ) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.shift = nn.Parameter(shift, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.record = nn.Parameter(shift.new_zeros(5), requires_grad=False)
        self.register_parameter("directions", None)
        self.center = center
        self.path = ""
        self.lane: Any = None

    @property
    def center(self) -> float:
        """How much of their mean is taken from the filters of the layer before, from 0 to 1 in steps of 1/256.

        Kept as a whole number: all dtypes hold it, averages of networks leave it as it is, and graph compilers take it for a
        constant.
        """
        return self._center_steps / CENTER_STEPS

    @center.setter
    def center(self, value: float) -> None:
        self._center_steps = round(value * CENTER_STEPS)
        self.record.data[0] = self.center

    @property
    def num_features(self) -> int:
        """Number of channels, as BatchNorm has it."""
        return int(self.shift.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, which has its channels along dimension 1.

        Raises:
            NormPropError: the site belongs to no network, or is reached on a path that was not recorded; something computes
                its γ or β.
        """
        x = self.normalize(x)
        for name, module in self._modules.items():
            if name == "parametrizations":
                raise NormPropError(
                    f"a parametrisation computes γ or β of {self.path}, which a site learns itself.\n"
                    "Remove it with torch.nn.utils.parametrize.remove_parametrizations."
                )
            x = module(x)  # type: ignore[misc]  # no entry is None
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """`forward` without the modules inside."""
        if self.lane is None:
            raise NormPropError("this site belongs to no converted network.\nTake it from what normprop.convert returned.")
        normalized: Tensor = self.lane.arrive(self, x)
        return normalized

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take directions as they come, and how far filters are centred; refuse what belongs to another function."""
        found = state_dict.get(f"{prefix}directions")
        if found is None and f"{prefix}scale" in state_dict:
            self.directions = None
        elif found is not None and (self.directions is None or self.directions.shape != found.shape):
            self.directions = nn.Parameter(self.scale.new_empty(found.shape), requires_grad=False)
        record = state_dict.get(f"{prefix}record")
        if isinstance(record, Tensor) and record.shape == self.record.shape and not record.is_meta:
            if not self.record.is_meta and not _same_function(record.tolist(), self.record.tolist()):
                args[-1].append(
                    f"{prefix}record is that of another conversion: the moments before this site are others there. Convert "
                    "with the same method, rules, and example= of the same size."
                )
                return
            self.center = float(record[0]) if record[0] < PRINTED - 0.5 else 0.0
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Number of channels and of calls."""
        calls = f", calls={self.shift.shape[0]}" if self.shift.dim() == 2 else ""
        return f"{self.shift.shape[-1]}{calls}"


def _same_function(mine: list[float], theirs: list[float]) -> bool:
    """Whether two records are of sites that compute the same with the same parameters; averaging rounds their numbers."""
    if (round(mine[0]) == PRINTED) != (round(theirs[0]) == PRINTED):
        return False
    first, second = (
        sum(round(byte) << shift for byte, shift in zip(r[1:], (24, 16, 8, 0), strict=True)) for r in (mine, theirs)
    )
    return abs(first - second) <= _TOLERANCE


def standard_normal(like: Tensor, shape: tuple[int, ...]) -> Moments:
    """Moments of a standardised input: mean 0 and variance 1 everywhere."""
    like = wide(like)
    return Moments(like.new_zeros(shape), like.new_ones(shape))


def given_moments(mean: Tensor, var: Tensor) -> Moments:
    """Moments of an input which is not standardised, kept as constants of the network."""
    return Moments(mean, var)


def widened(moments: Moments, eps: float) -> Moments:
    """What a site takes moments for that may hardly vary, as a rectifier's do far below zero: ε besides, like BatchNorm.

    A variance of 1e-20 says what Gaussian tails say, and data has others; 1/√V of it has no bound.
    """
    return Moments(moments.mean, moments.var + eps)


def site_moments(*calls: tuple[Site, int, int]) -> list[Moments]:
    """What leaves several sites: ``u = γ û + β ~ N(β, γ²)`` (derived).

    Args:
        calls: one entry a site: the site, the rank of the tensor that it gives, and the channel dimension of that.
    """
    gammas, betas, shapes = [], [], []
    for site, rank, channel in calls:
        gamma, beta, *_ = _constants(site, 0)
        gammas.append(gamma)
        betas.append(beta)
        shapes.append([len(gamma) if d == channel % rank else 1 for d in range(rank)])
    if is_traced():
        return [Moments(b.reshape(s), g.square().reshape(s)) for b, g, s in zip(betas, gammas, shapes, strict=True)]
    flat = _SiteMoments.apply(shapes, *gammas, *betas)
    return [Moments(*pair) for pair in zip(flat[len(calls) :], flat[: len(calls)], strict=True)]


class _SiteMoments(torch.autograd.Function):
    """γ² and β of several sites in given shapes, by few operations: small networks spend their time on these."""

    @staticmethod
    def forward(ctx: Any, shapes: list[list[int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        gammas, betas = tensors[: len(shapes)], tensors[len(shapes) :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gammas)
        squares = torch._foreach_mul(gammas, gammas)
        return (
            *(t.view(s) for t, s in zip(squares, shapes, strict=True)),
            *(t.view(s) for t, s in zip(betas, shapes, strict=True)),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gammas = ctx.saved_tensors
        by_var, by_mean = grads[: len(gammas)], grads[len(gammas) :]
        found = [None if g is None else 2.0 * gamma * g.reshape(-1) for gamma, g in zip(gammas, by_var, strict=True)]
        return (None, *found, *(g if g is None else g.reshape(-1) for g in by_mean))


SiteArguments = tuple[Tensor | None, Site, Moments | None, Mapping[str, Any]]


def site_scales(*calls: SiteArguments) -> list[Scale]:
    """What several sites make of the layers before them.

    ``f = γ/√(kV)`` and ``b = β − (E + d√V) f`` (derived; d is in units of √V, so that a calibrated site doesn't feel
    the scale of its weight either). A bias that a layer had is taken away by the normalisation and
    does not appear.

    Args:
        calls: one entry a site: the weight of the layer before it (None if there is none), the site, the moments of the
            layer's input, or of what the site normalises (None for a standardised input), and options: ``channel``, its
            channel dimension, ``groups`` and ``center`` as in `Form`, ``transposed_stride``, the product of the strides of a
            transposed convolution, and ``call``, which of the site's calls this is.

    Returns:
        A `Scale` a site.
    """
    forms, operands = zip(*(site_operands(call) for call in calls), strict=True)
    with full_precision(operands[0].shift):
        return scales(forms, operands)


def site_statistics(call: SiteArguments) -> tuple[Tensor | None, Tensor, Tensor]:
    """Filters, E and V of one site, which `site_scales` would use."""
    form, operands = site_operands(call)
    with full_precision(operands.shift):
        return plain_statistics(form, operands)


def site_parts(call: SiteArguments) -> tuple[Tensor | None, Tensor, Tensor]:
    """Filters, factor and offset of one site apart, for a layer that something wraps."""
    form, operands = site_operands(call)
    with full_precision(operands.shift):
        return parts(form, operands)


def site_operands(arguments: SiteArguments) -> tuple[Form, Operands]:
    """What the arithmetic of one site takes."""
    weight, site, x, options = arguments
    stride = options.get("transposed_stride", 0)
    form = Form(options.get("groups", 1), stride > 0, max(stride, 1), 0.0 if weight is None else site.center)
    weight = None if weight is None else wide(weight)
    vectors = _vectors(site, weight, x, options.get("channel", 1), form)
    call = options.get("call", 0)
    return form, Operands(weight, *vectors, *_constants(site, call), _directions(site, call, weight))


def _vectors(
    site: Site, weight: Tensor | None, x: Moments | None, channel: int, form: Form
) -> tuple[Tensor | None, Tensor | None]:
    """Mean and variance a channel."""
    if x is None:
        return None, None
    count = site.shift.shape[-1]
    if weight is not None:
        count = weight.shape[0] if form.transposed else weight.shape[1] * form.groups
    if not x.mean.numel() == x.var.numel() == x.mean.shape[channel] == count:
        x = x.channels(channel).expanded((count,))
    return wide(x.mean), wide(x.var)


def _directions(site: Site, call: int, weight: Tensor | None) -> Tensor | None:
    """U of one call of a site.

    Raises:
        NormPropError: they don't fit the weight.
    """
    known = _tensors(site)
    directions = known.get("directions")
    if directions is None or weight is None:
        return None
    if directions.shape[1 - weight.dim() :] != weight.shape[1:]:
        raise NormPropError(
            f"the directions of {site.path} have shape {tuple(directions.shape)}, and the weight before it "
            f"{tuple(weight.shape)}.\nLoad a state_dict of the same architecture, or calibrate."
        )
    return wide(directions[call] if known["shift"].dim() == 2 else directions)


def _constants(site: Site, call: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """γ, β, d and k of one call of a site, ``(C,)`` each."""
    known = _tensors(site)
    shift, scale = known["shift"], known["scale"]
    if shift.dim() == 2:
        shift, scale = shift[call], scale[call]
    shift, scale, gamma, beta = wide(shift), wide(scale), known.get("weight"), known.get("bias")
    return (
        torch.ones_like(shift) if gamma is None else wide(gamma),
        torch.zeros_like(shift) if beta is None else wide(beta),
        shift,
        scale,
    )


def site_tensors(site: Site, call: int, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """γ, β, d, k and U of one call of a site, the last one None where there is none.

    Args:
        site: the site.
        call: which of its calls.
        weight: of the layer before it, None without one.
    """
    return (*_constants(site, call), _directions(site, call, weight))


def _tensors(site: Site) -> dict[str, Any]:
    """What a site holds by name; a module's own lookup takes a while, and small networks do little else.

    The replicas of `torch.nn.DataParallel` hold tensors as plain attributes.
    """
    own = site.__dict__
    found: dict[str, Any] = own if "_is_replica" in own else own["_parameters"]
    return found
