"""What a walk found of one operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from normprop.channel_moments import Moments
from normprop.inspection.histogram import Histogram

Role = Literal["input", "linear", "activation", "normaliser", "average", "join", "other"]


@dataclass(frozen=True, eq=False)
class Row:
    """Moments of one operation's output.

    Attributes:
        name: of the operation in the record, unique.
        path: module path; of the module it calls, or whose forward it stands in.
        operation: class or function.
        standing: "exact" or "approximate", as its rule says; "input" for an input.
        reason: why it is approximate.
        source: ``file:line`` of the model's code.
        shape: of the tensor in the example run, batch first.
        predicted: mean and variance.
        slope: for an activation ``E f'² · Var u / Var f``, averaged over channels: how much more a small change of its input
            grows than the signal does; else None.
        sensitivity: product of the slopes along the paths from the input, each path weighted by the variance it carries:
            a change of the input, relative to the signal, is √sensitivity times larger here, and so are gradients on the
            way back.
        measured: mean and variance on data, if there was any.
        inputs: names of the rows whose tensors it reads.
        role: what kind of operation it is.
        rule: name of the rule that predicted it, and what the rule says of itself.
        histogram: of the measured values, if there were any.
        inner: whether it stands within a function that is taken as one, and nothing else reads it.
    """

    name: str
    path: str
    operation: str
    standing: str
    reason: str
    source: str
    shape: tuple[int, ...]
    predicted: Moments
    slope: float | None = None
    sensitivity: float = 1.0
    measured: Moments | None = None
    inputs: tuple[str, ...] = ()
    role: Role = "other"
    rule: str = ""
    histogram: Histogram | None = None
    inner: bool = False

    @property
    def place(self) -> str:
        """The path, or the name where the model itself runs the operation."""
        return self.path or self.name

    @property
    def known(self) -> Moments:
        """What was measured; what was predicted, where nothing was."""
        return self.predicted if self.measured is None else self.measured

    @property
    def signal(self) -> float:
        """Standard deviation over samples and positions: root of the channels' mean variance."""
        return _number(self.known.var.double().mean().sqrt())

    @property
    def offset(self) -> float:
        """Root mean square of the channels' means."""
        return _number(self.known.mean.double().square().mean().sqrt())

    @property
    def drift(self) -> float | None:
        """``log₂`` of measured over predicted standard deviation, rms over channels: octaves. None where either is zero."""
        if self.measured is None:
            return None
        both = (self.predicted.std > 0) & (self.measured.std > 0)
        ratios = (self.measured.std / self.predicted.std)[both]
        return _number(ratios.log2().square().mean().sqrt()) if ratios.numel() else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; moments pooled over channels."""
        result = {k: getattr(self, k) for k in ("name", "path", "operation", "standing", "reason", "source", "role", "rule")}
        result |= {"shape": list(self.shape), "inputs": list(self.inputs)}
        result |= {"slope": self.slope, "sensitivity": self.sensitivity, "drift": self.drift}
        for kind in ("predicted", "measured"):
            moments: Moments | None = getattr(self, kind)
            result[kind] = None if moments is None else _summary(moments)
        return result


def _summary(moments: Moments) -> dict[str, float]:
    pooled = moments.pooled(list(range(moments.mean.dim())))
    return {
        "mean": _number(pooled.mean),
        "std": _number(pooled.std),
        "rms_of_channel_means": _number(moments.mean.square().mean().sqrt()),
        "mean_channel_var": _number(moments.var.mean()),
    }


def _number(tensor: Tensor) -> float:
    return float(tensor.detach().reshape(()))
