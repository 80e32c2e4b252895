"""What is known of the input, and the module that standardises it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normprop.errors import NormPropError

Per = Literal["channel", "element"]

# Values per block when a whole tensor is measured: a uint8 data set needn't exist in float64 all at once.
_BLOCK = 1 << 22

# Below this share of the squared mean, a variance measured in float64 is the rounding noise of a constant feature.
_CONSTANT = 1e-24


@dataclass(frozen=True, eq=False)
class InputStats:
    """Mean and variance of a network's input over a data set, in the input's own units.

    Attributes:
        mean: Float64, shape `(channels,)`, or `shape` for `per="element"`.
        var: Population variance (divided by `count`), same shape as `mean`.
        count: Values behind each entry: samples times positions. 0 where the statistics are assumed, not measured.
        shape: Shape of one sample without the batch dimension, `(3, 32, 32)` for instance.
        per: `"channel"`: one entry for each index of dimension 1. `"element"`: one for each element of a sample.

    Example:
        >>> stats = InputStats.from_tensor(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
        >>> stats.mean.tolist(), stats.var.tolist(), stats.count, stats.shape
        ([1.0, 5.0], [1.0, 0.0], 2, (2,))
    """

    mean: Tensor
    var: Tensor
    count: int
    shape: tuple[int, ...]
    per: Per = "channel"

    @classmethod
    def from_loader(
        cls, loader: Iterable[object], *, per: Per = "channel", device: torch.device | str | None = None
    ) -> InputStats:
        """Measure in one pass over a loader, in float64, whatever the batches' sizes.

        Batches are merged by the formula of Chan, Golub and LeVeque (1979), which doesn't cancel as sums of squares do.

        Args:
            loader: Yields tensors of shape `(batch, channels, ...)`, or tuples, lists or mappings, of which the first
                tensor is taken. Integers (uint8 images) are promoted, not rescaled.
            per: One mean and variance per channel (dimension 1) or per element of a sample.
            device: Where to compute; by default where each batch is.

        Raises:
            NormPropError: for an empty loader, fewer than two values, NaN or infinity, complex numbers, or batches
                that disagree in their channels.

        Example:
            >>> batches = [(torch.zeros(2, 1), "a label"), (torch.ones(2, 1), "another")]
            >>> InputStats.from_loader(batches).var.item()
            0.25
        """
        total: InputStats | None = None
        for batch in loader:
            x = _first_tensor(batch)
            if x.numel():
                part = _measure(x, per, device)
                total = part if total is None else total.merge(part)
        if total is None:
            raise NormPropError("The input is empty: no values to measure.\nPass at least two samples.")
        if total.count < 2:
            raise NormPropError("One sample has no variance.\nPass at least two samples, or use InputStats.standard.")
        if not bool(torch.isfinite(total.mean).all() and torch.isfinite(total.var).all()):
            raise NormPropError("The input holds NaN or infinite values.\nClean the data before measuring it.")
        return total

    @classmethod
    def from_tensor(cls, x: Tensor, *, per: Per = "channel") -> InputStats:
        """Measure a whole data set held as one tensor of shape `(samples, channels, ...)`, where it lies.

        Raises:
            NormPropError: as `from_loader`.

        Example:
            >>> images = torch.arange(12, dtype=torch.uint8).reshape(2, 3, 1, 2)
            >>> InputStats.from_tensor(images).mean.tolist()
            [3.5, 5.5, 7.5]
        """
        _check_layout(x)
        samples = max(1, _BLOCK // max(1, x[:1].numel()))
        return cls.from_loader((x[i : i + samples] for i in range(0, len(x), samples)), per=per)

    @classmethod
    def standard(cls, *shape: int) -> InputStats:
        """Assume mean 0 and variance 1: what a standardised input has. `shape` is channels, then any positions.

        Raises:
            NormPropError: without channels, or for a size below one.

        Example:
            >>> InputStats.standard(3, 32, 32).shape
            (3, 32, 32)
        """
        if not shape or min(shape) < 1:
            raise NormPropError(f"No input has the shape {shape}.\nPass the channels, then the size: standard(3, 32, 32).")
        ones = torch.ones(shape[0], dtype=torch.float64)
        return cls(torch.zeros_like(ones), ones, 0, shape)

    @property
    def std(self) -> Tensor:
        """Standard deviation, same shape as `mean`."""
        return self.var.sqrt()

    def to(self, device: torch.device | str) -> InputStats:
        """The same statistics on another device."""
        return replace(self, mean=self.mean.to(device), var=self.var.to(device))

    def merge(self, other: InputStats) -> InputStats:
        """Statistics of both data sets together, as if measured in one pass.

        Raises:
            NormPropError: when they differ in channels or in `per`, or when one is assumed rather than measured.

        Example:
            >>> low, high = torch.zeros(3, 2), torch.ones(1, 2)
            >>> InputStats.from_tensor(low).merge(InputStats.from_tensor(high.expand(3, 2))).mean.tolist()
            [0.5, 0.5]
        """
        if self.per != other.per or self.mean.shape != other.mean.shape:
            raise NormPropError(
                f"Samples of shape {self.shape} and {other.shape} (per {self.per}, {other.per}) don't go together.\n"
                "Measure one kind of input at a time; per='channel' accepts images of several sizes."
            )
        if not (self.count and other.count):
            raise NormPropError("Assumed statistics have no weight to merge by.\nMerge measured ones only.")
        count = self.count + other.count
        share = other.count / count
        delta = other.mean.to(self.mean.device) - self.mean
        var = self.var + share * (other.var.to(self.var.device) - self.var) + share * (1 - share) * delta.square()
        return replace(self, mean=self.mean + share * delta, var=var, count=count)

    def synchronized(self) -> InputStats:
        """Statistics over all processes, each of which measured its own part; itself outside `torch.distributed`.

        The result is the same on every process: parts are merged in the order of ranks.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self
        device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
        mine = torch.cat([self.mean.new_tensor([self.count]), self.mean.flatten(), self.var.flatten()]).to(device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)
        total: InputStats | None = None
        for part in parts:
            mean, var = part[1:].to(self.mean.device).view(2, *self.mean.shape)
            stats = replace(self, mean=mean, var=var, count=int(part[0]))
            total = stats if total is None else total.merge(stats)
        assert total is not None
        return total


class Standardize(nn.Module):
    """The input with mean 0 and variance 1 per channel or element: `(x − mean)/√(var + eps)`.

    A feature that is constant in the data comes out as 0. Floating-point input keeps its dtype; integers (uint8 images)
    come out in the dtype of the statistics. There is nothing to train; the statistics are buffers.

    Args:
        stats: What was measured on the training set.
        mode: `"global"` uses `stats` always, so that a sample's output depends on that sample alone. `"batch"` uses the
            mini-batch's own moments in training, which regularises, and a running average, started at `stats`, in
            evaluation (the two data normalisations of Arpit et al. 2016, section 4).
        eps: Added to the variance, in the square of the input's units. 0 is exact; raise it where features are nearly
            constant, as the border pixels of digits per element are.
        momentum: Weight of the newest mini-batch in the running average.

    Example:
        >>> x = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
        >>> Standardize(InputStats.from_tensor(x))(x).tolist()
        [[-1.0, 0.0], [1.0, 0.0]]
    """

    mean: Tensor
    var: Tensor

    def __init__(
        self,
        stats: InputStats,
        mode: Literal["global", "batch"] = "global",
        *,
        eps: float = 0.0,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if mode not in ("global", "batch"):
            raise NormPropError(f"Unknown data normalisation {mode!r}.\nChoose 'global' or 'batch'.")
        if not (torch.isfinite(stats.mean).all() and torch.isfinite(stats.var).all() and (stats.var >= 0).all()):
            raise NormPropError("Means must be finite, variances finite and not negative.\nMeasure the input again.")
        self.mode = mode
        self.per = stats.per
        self.eps = eps
        self.momentum = momentum
        # Rounding to the buffers' dtype must not make a constant feature look alive.
        var = torch.where(stats.var <= _CONSTANT * stats.mean.square(), 0.0, stats.var)
        self.register_buffer("mean", stats.mean.to(torch.get_default_dtype(), copy=True))
        self.register_buffer("var", var.to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise a batch of shape `(batch, channels, ...)`.

        Raises:
            NormPropError: for another shape than was measured, complex numbers, or a batch of one in training with
                `mode="batch"`.
        """
        _check_layout(x)
        found = x.shape[1:2] if self.per == "channel" else x.shape[1:]
        if found != self.mean.shape:
            raise NormPropError(
                f"The input has {tuple(found)} {self.per}s, the statistics {tuple(self.mean.shape)}.\n"
                "Measure InputStats on the same kind of input that the network gets."
            )
        dtype = x.dtype if x.is_floating_point() else self.mean.dtype
        z = x.to(torch.promote_types(dtype, self.mean.dtype))
        mean, var = self._batch_moments(z) if self.mode == "batch" and self.training else (self.mean, self.var)
        inverse = torch.where(var > 0, (var + self.eps).rsqrt(), 0.0)
        if self.per == "channel":
            along = (-1, *[1] * (x.dim() - 2))
            mean, inverse = mean.view(along), inverse.view(along)
        return ((z - mean) * inverse).to(dtype)

    def _batch_moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of this mini-batch, which also move the running average."""
        if len(z) < 2:
            raise NormPropError(
                "Batch data normalisation can't train at batch size 1: one sample has no spread.\n"
                "Use mode='global' (--data-norm global), or a batch of at least 2."
            )
        dims = [0, *range(2, z.dim())] if self.per == "channel" else [0]
        var, mean = torch.var_mean(z, dim=dims, correction=0)
        var = torch.where(var <= (8 * torch.finfo(var.dtype).eps) ** 2 * mean.square(), 0.0, var)
        n = z.numel() // mean.numel()
        with torch.no_grad():
            self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
            self.var.lerp_((var * (n / (n - 1))).to(self.var.dtype), self.momentum)
        return mean, var

    def extra_repr(self) -> str:
        """Shape and mode, for `print(model)`."""
        return f"{tuple(self.mean.shape)}, mode={self.mode!r}, per={self.per!r}, eps={self.eps}"


def _check_layout(x: Tensor) -> None:
    if x.is_complex():
        raise NormPropError("Complex input has no mean and variance per channel.\nPass torch.view_as_real(x) or abs(x).")
    if x.dim() < 2:
        raise NormPropError(
            f"An input of shape {tuple(x.shape)} lacks a batch or a channel dimension.\nUse (batch, channels, ...)."
        )


def _first_tensor(batch: object) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    for part in parts:
        if isinstance(part, Tensor):
            return part
    raise NormPropError(
        f"A batch of type {type(batch).__name__} holds no tensor.\nYield tensors, or tuples or mappings that hold one."
    )


def _measure(x: Tensor, per: Per, device: torch.device | str | None) -> InputStats:
    """Moments of one batch in float64."""
    _check_layout(x)
    target = torch.device(device) if device is not None else x.device
    # Apple's GPUs have no float64.
    x = x.detach().to("cpu" if target.type == "mps" else target, torch.float64)
    dims = [0, *range(2, x.dim())] if per == "channel" else [0]
    var, mean = torch.var_mean(x, dim=dims, correction=0)
    return InputStats(mean, var, x.numel() // mean.numel(), tuple(x.shape[1:]), per)
