"""Normalization Propagation (Arpit et al., 2016) for PyTorch: networks normalised by arithmetic, not by batch statistics."""

from normprop import nn, optim
from normprop.accumulation import accumulate
from normprop.activation_moments import ActivationMoments, moments
from normprop.bound import CanonicalErrorBound, canonical_error_bound
from normprop.calibrate import calibrate
from normprop.channel_moments import Moments
from normprop.convert import convert
from normprop.data import InputStats, Standardize
from normprop.errors import NormPropError, NotFiniteError, TracingError, UnsupportedOpError
from normprop.fold import fold
from normprop.inspect import inspect
from normprop.propagate import propagate
from normprop.recalibrate import recalibrate
from normprop.report import Report
from normprop.rules import rule
from normprop.stretch import init_beta_, stretch

__all__ = [
    "ActivationMoments", "CanonicalErrorBound", "InputStats", "Moments", "Report", "Standardize",
    "NormPropError", "NotFiniteError", "TracingError", "UnsupportedOpError",
    "accumulate", "calibrate", "canonical_error_bound", "convert", "fold", "init_beta_", "inspect", "moments",
    "propagate", "recalibrate", "rule", "stretch",
    "nn", "optim",
]  # fmt: skip
