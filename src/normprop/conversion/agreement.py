"""Two networks compared on random input."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop.errors import NormPropError
from normprop.graph.copies import independent_copy, running_copy
from normprop.graph.example_inputs import Inputs
from normprop.precision import reference_tensor

_EXTENTS = (32, 64, 128)


class Agreement:
    """What a network computes on random input in eval mode, to be compared with another one.

    Args:
        model: the network; it is left as it is.
        example: inputs that it runs on, on the meta device.
    """

    def __init__(self, model: nn.Module, example: Inputs) -> None:
        self.model = model
        self.known = reference_tensor(model).device.type != "meta"
        if not self.known:
            return
        for inputs in (*smaller(example), example):
            self.inputs = inputs.random(reference_tensor(model), batch=_batch(inputs))
            try:
                self.outputs = _run(model, self.inputs)
            except Exception:  # too small for a window, or a head that fixes the extent
                continue
            return
        self.known = False  # a network that doesn't run on random numbers (a text, an index): nothing to compare

    def check(self, other: nn.Module, what: str = "converted") -> None:
        """Compare.

        Raises:
            NormPropError: they differ by more than rounding, in float64, too.
        """
        if not self.known:
            return
        outputs = _run(other, self.inputs)
        if what == "folded" and any(bool(t.isnan().any()) for t in outputs if t.is_floating_point()):
            raise self._error(what, float("nan"))
        difference, limit = self._difference(outputs)
        if difference <= limit:
            return
        if limit < 1e-6:
            raise self._error(what, difference)
        wide = Agreement.__new__(Agreement)
        wide.known, wide.inputs = True, self.inputs.map(lambda t: t.double() if t.is_floating_point() else t)
        wide.outputs = _run(independent_copy(self.model).double(), wide.inputs)
        difference, _ = wide._difference(_run(copy.deepcopy(other).double(), wide.inputs))
        if not difference <= limit:  # constants were computed in the network's own precision
            raise self._error(what, difference)

    def _difference(self, outputs: list[Tensor]) -> tuple[float, float]:
        worst, limit = 0.0, 1e-8
        for a, b in zip(self.outputs, outputs, strict=True):
            limit = max(limit, {torch.float64: 1e-8, torch.float32: 1e-3}.get(a.dtype, 0.1))
            if a.shape != b.shape:
                return float("inf"), limit
            if a.is_floating_point() and a.numel():
                both_nan = a.isnan() & b.isnan()
                off = (a.double() - b.double()).abs().masked_fill(both_nan | (a == b), 0.0)
                size = a.double().abs().nan_to_num(posinf=0.0).max().clamp(min=1e-30)
                worst = max(worst, float(off.max() / size))
        return worst, limit

    @staticmethod
    def _error(what: str, difference: float) -> NormPropError:
        return NormPropError(
            f"the {what} network differs from the original by {difference:.1e} relative: part of it can't be followed.\n"
            "Convert a part that can be, normprop.convert(model.part, in_place=True), or start fresh with preserve=False."
            if what == "converted"
            else f"the {what} network differs from the original by {difference:.1e} relative.\n"
            "Statistics close to zero amplify rounding: fold in float64, or pass check=False if this is accepted."
        )


def smaller(example: Inputs) -> list[Inputs]:
    """Inputs of less than the example's extent, where nothing is gained by comparing large images."""
    large = [t for t in example.tensors() if t.dim() > 3 and min(t.shape[-2:]) > _EXTENTS[0]]
    if not large:
        return []
    return [
        example.map(lambda t, e=extent: t[..., :e, :e] if t.dim() > 3 else t)
        for extent in _EXTENTS
        if extent < max(max(t.shape[-2:]) for t in large)
    ]


def _batch(inputs: Inputs) -> int | None:
    shapes = {t.shape[0] if t.dim() else 0 for t in inputs.tensors()}
    return 2 if shapes == {2} else None


@torch.no_grad()
def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Outputs of a copy, so that no hook of the user's and no buffer notices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = inputs.map(torch.clone)
        output: Any = running_copy(model).eval()(*given.args, **given.kwargs)
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
