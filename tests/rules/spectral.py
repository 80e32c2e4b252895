"""Fourier transforms, alone and around a filter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.rules.case import Case

_KERNEL = torch.tensor([0.5, -1.0, 0.25, 2.0], dtype=torch.float64)


def filtered(x: Tensor) -> Tensor:
    """Convolved through the frequency domain; the middle, where the kernel sees nothing but signal."""
    size = x.shape[-1] + len(_KERNEL) - 1
    spectrum = torch.fft.rfft(x, n=size) * torch.fft.rfft(_KERNEL.to(x.device), n=size)
    return torch.fft.irfft(spectrum, n=size)[..., len(_KERNEL) - 1 : x.shape[-1]]


def spectrogram(x: Tensor, **options: Any) -> Tensor:
    window = torch.hann_window(16, dtype=x.dtype, device=x.device)
    spectrum = torch.stft(x[:, 0], 16, 8, window=window, return_complex=True, center=False, **options)
    return torch.abs(spectrum)[..., 1:-1, :]  # without the frequencies 0 and 1/2, which are real


def squares(x: Tensor) -> Tensor:
    return torch.view_as_real(torch.stft(x[:, 0], 16, 16, center=False, return_complex=True)).pow(2).sum(-1)[:, 1:-1]


_TOLERANCE: dict[str, Any] = {"exact": False, "tolerance": 0.05, "samples": 4000}
CASES = {
    "rfft and irfft": Case(filtered, [(2, 48)], **_TOLERANCE),
    "there and back": Case(lambda x: torch.fft.irfft(torch.fft.rfft(x), n=15), [(2, 15)], **_TOLERANCE),
    "half of the frequencies": Case(
        lambda x: torch.fft.irfft(torch.fft.rfft(x) * (torch.arange(17) < 5), n=32), [(2, 32)], **_TOLERANCE
    ),
    "stft": Case(spectrogram, [(1, 64)], **_TOLERANCE),
    "stft normalised": Case(lambda x: spectrogram(x, normalized=True), [(1, 64)], **_TOLERANCE),
    "the method stft": Case(
        lambda x: x[:, 0].stft(8, 8, center=False, return_complex=True).abs()[:, 1:-1], [(1, 32)], **_TOLERANCE
    ),
    "view_as_real": Case(squares, [(1, 64)], **_TOLERANCE),
}
