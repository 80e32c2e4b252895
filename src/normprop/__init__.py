"""Normalization Propagation (Arpit et al., 2016) for PyTorch: networks normalised by arithmetic, not by batch statistics."""

from normprop import nn, optim
from normprop.activations.activation_moments import ActivationMoments, moments
from normprop.channel_moments import Moments
from normprop.conversion.accumulation import accumulate
from normprop.conversion.calibration import calibrate
from normprop.conversion.conversion import convert
from normprop.conversion.folding import fold
from normprop.conversion.kept_calibration import KeptCalibration, keep_calibrated
from normprop.conversion.lane import lane
from normprop.conversion.recalibration import recalibrate
from normprop.conversion.stretch import init_beta_, stretch
from normprop.data import InputStats, Standardize
from normprop.errors import NormPropError, NotFiniteError, TracingError, UnsupportedOpError
from normprop.inspection.bound import CanonicalErrorBound, canonical_error_bound
from normprop.inspection.measurement import inspect
from normprop.inspection.moment_probe import MomentProbe
from normprop.inspection.propagation import propagate
from normprop.inspection.report import Report
from normprop.rules import rule

__all__ = [
    "ActivationMoments", "CanonicalErrorBound", "InputStats", "KeptCalibration", "MomentProbe", "Moments", "Report",
    "Standardize", "NormPropError", "NotFiniteError", "TracingError", "UnsupportedOpError",
    "accumulate", "calibrate", "canonical_error_bound", "convert", "fold", "init_beta_", "inspect",
    "keep_calibrated", "lane", "moments", "propagate", "recalibrate", "rule", "stretch",
    "nn", "optim",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
