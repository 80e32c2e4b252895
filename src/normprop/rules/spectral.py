"""Signals taken apart into frequencies, filtered there, and put together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.rules.table import rule

Shape = Sequence[int]

_REASON = "positions of a signal are taken as independent, its ends not counted"


class Spectrum(Moments):
    """Moments of complex amplitudes, a frequency an entry: the size of the mean, and ``E |X − E X|²``.

    Real and imaginary part share the variance evenly, except at the frequencies 0 and ½, which are real.
    """

    def scaled(self, factor: Tensor | float) -> Spectrum:
        """Moments of ``factor · X``."""
        if isinstance(factor, Tensor) and factor.is_complex():
            return Spectrum(self.mean * factor.real, self.var * factor.abs().square())
        return Spectrum(self.mean * factor, self.var * (factor * factor))


def _along_last(x: Moments, dim: int, norm: str | None) -> Moments:
    """The moments of a signal along its last dimension, which are those of all its positions."""
    if dim % x.mean.dim() != x.mean.dim() - 1 or norm not in (None, "backward"):
        raise NormPropError("Fourier transforms have a moment rule along the last dimension, with torch's own factors.")
    return x.pooled([-1])


@rule(torch.fft.rfft, standing="approximate", reason=_REASON, shaped=True)
def rfft(
    x: Moments, n: int | None = None, dim: int = -1, norm: str | None = None, *, in_shapes: Sequence[Shape], out_shape: Shape
) -> Spectrum:
    """``X_k = Σ x_t e^{−iωt}`` of n positions: ``E X_0 = n m``, all others 0; ``Var = n v`` at each (independent terms)."""
    x, size = _along_last(x, dim, norm), n or in_shapes[0][-1]
    mean = x.mean.expand(*x.mean.shape[:-1], out_shape[-1])
    lowest = torch.arange(out_shape[-1], device=mean.device) == 0
    return Spectrum(size * mean * lowest, (size * x.var).expand_as(mean))


@rule(torch.fft.irfft, standing="approximate", reason=_REASON, shaped=True)
def irfft(
    x: Moments, n: int | None = None, dim: int = -1, norm: str | None = None, *, in_shapes: Sequence[Shape], out_shape: Shape
) -> Moments:
    """``x_t = Σ X_k e^{iωt} / n`` over n frequencies, of which half are given: ``E = X_0 / n``, ``Var = Σ Var X_k / n²``."""
    size, given = out_shape[-1], in_shapes[0][-1]
    whole = x.expanded((*x.mean.shape[:-1], given))
    _along_last(whole, dim, norm)
    place = torch.arange(given, device=whole.mean.device)
    twice = 2.0 - ((place == 0) | (2 * place == size)).to(whole.var)
    twice = twice * (2 * place <= size)
    return Moments(whole.mean[..., :1] / size, (whole.var * twice).sum(-1, keepdim=True) / size**2)


@rule(torch.stft, "stft", standing="approximate", reason=_REASON, shaped=True)
def stft(
    x: Moments,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    pad_mode: str = "reflect",
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    *,
    in_shapes: Sequence[Shape],
    out_shape: Shape,
    **_: Any,
) -> Spectrum:
    """Of a window w, ``E X_k = m Σ w_t e^{−iωt}`` and ``Var X_k = v Σ w²`` (independent terms); over √n if normalised."""
    if not return_complex:
        raise NormPropError("torch.stft has a moment rule with return_complex=True.")
    x = x.pooled([-1])
    length = win_length or n_fft
    w = x.mean.new_ones(length) if window is None else window.to(x.mean)
    left = (n_fft - length) // 2
    w = torch.nn.functional.pad(w, (left, n_fft - length - left)) / (math.sqrt(n_fft) if normalized else 1.0)
    sizes = torch.fft.fft(w).abs()[: out_shape[-2], None]
    mean = x.mean.unsqueeze(-1) * sizes
    return Spectrum(mean, (x.var.unsqueeze(-1) * w.square().sum()).expand_as(mean))


@rule(torch.view_as_real, shaped=True, standing="approximate", reason="the mean is given to the real part")
def view_as_real(x: Moments, *, in_shapes: Sequence[Shape], out_shape: Shape) -> Moments:
    """Real and imaginary part: half of the variance each."""
    mean, var = torch.broadcast_tensors(x.mean, x.var)
    return Moments(torch.stack([mean, torch.zeros_like(mean)], -1), torch.stack([var, var], -1) / 2)


def magnitude(x: Spectrum) -> Moments:
    """Of a complex Gaussian: ``E |X| = ½ √(πv) ((1 + 2q) I₀(q) + 2q I₁(q)) e^{−q}`` with q = ν²/2v (Rice, 1945).

    ``E |X|² = v + ν²``. Where q is beyond 1e6 the imaginary part counts for nothing: mean ν, variance v/2.
    """
    size = x.mean.abs()
    wide = x.var > 5e-7 * size.square()
    v, mean = torch.where(wide, x.var, 1.0), torch.where(wide, size, 0.0)
    q = mean.square() / (2.0 * v)
    scaled = (1.0 + 2.0 * q) * torch.special.i0e(q) + 2.0 * q * torch.special.i1e(q)
    found = 0.5 * torch.sqrt(math.pi * v) * scaled
    spread = (v + mean.square() - found.square()).clamp(min=0.0)
    return Moments(torch.where(wide, found, size), torch.where(wide, spread, x.var / 2.0))
