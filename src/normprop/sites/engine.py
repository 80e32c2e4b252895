"""Factor and offset of normalisation sites, many at once, by whichever engine fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normprop.native.operands import handles, handles_whole, is_traced
from normprop.sites.c_engine import native_scales
from normprop.sites.reference import Scale
from normprop.sites.rows import Form, Operands
from normprop.sites.torch_engine import TorchScales, buckets_of, computed
from normprop.sites.traced_engine import whole_scales

# With fewer weights than this in all, a graph compiler does better with plain operations than with one that it has to call.
_WHOLE = 1 << 19


def scales(forms: Sequence[Form], operands: Sequence[Operands]) -> list[Scale]:
    """The scales of several sites: E = Σ c m and V = Σ c² v for the filters c (Arpit et al., 2016, §3), or given moments.

    With directions U_r, which say along what the layer's input varies more than its channels do by themselves, it is
    V = Σ c² v + Σ_r (Σ c √v U_r)² (derived: the variance of c·x for inputs of covariance √v (1 + Σ_r U_r U_rᵀ) √v).
    A variance of zero (a filter of zeros) counts as one. Differentiable twice, by a function that handles all sites
    together, compiled or else of torch's operations. In exported graphs and the transforms of `torch.func` it is plain
    operations.
    """
    tensors = [t for one in operands for t in one]
    if handles_whole(tensors, operands[0].gamma.dtype) and _weights(operands) >= _WHOLE:
        return whole_scales(forms, operands)
    if is_traced():
        plain: Any = computed(buckets_of(forms, operands), operands)[0]
        return [Scale(*plain[i : i + 3]) for i in range(0, len(plain), 3)]
    if handles(tensors, operands[0].gamma.dtype):
        return native_scales(forms, operands)
    outputs = TorchScales.apply(tuple(forms), *tensors)
    return [Scale(*outputs[i : i + 3]) for i in range(0, len(outputs), 3)]


def _weights(operands: Sequence[Operands]) -> int:
    return sum(one.weight.numel() for one in operands if one.weight is not None)
