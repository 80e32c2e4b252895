"""Normalization Propagation (Arpit et al., 2016) for PyTorch: networks normalised by arithmetic, not by batch statistics."""

from normprop.activation_moments import ActivationMoments, moments
from normprop.calibrate import calibrate
from normprop.channel_moments import Moments
from normprop.convert import convert
from normprop.errors import NormPropError, TracingError, UnsupportedOpError
from normprop.fold import fold
from normprop.propagate import propagate
from normprop.report import Report
from normprop.rules import rule

__all__ = [
    "ActivationMoments", "Moments", "NormPropError", "Report", "TracingError", "UnsupportedOpError",
    "calibrate", "convert", "fold", "moments", "propagate", "rule",
]  # fmt: skip
