"""Predicted against measured while training: hidden layer by hidden layer, and how far Proposition 1 carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normprop.channel_moments import Moments
from normprop.conversion.folding import fold
from normprop.conversion.lane import lanes_in
from normprop.errors import NormPropError
from normprop.inspection.bound import canonical_error_bound
from normprop.inspection.measurement import inspect
from normprop.inspection.report import Report
from normprop.inspection.row import Row

_LINEAR = (_ConvNd, nn.Linear)


@dataclass(frozen=True)
class Agreement:
    """What is predicted of a tensor and what is measured, over its channels.

    Attributes:
        unit_mean: Measured mean of channel 0.
        mean_size: Mean over channels of the measured |mean|.
        predicted_mean_size: The same of the predicted means.
        std: Root of the measured variance's mean over channels.
        predicted_std: The same of the predicted variances.
        mean_error: Root mean square of (measured mean − predicted mean) over channels, in units of `predicted_std`.
        drift: Root mean square over channels of log₂ of measured over predicted standard deviation: octaves. None where
            all of them are zero.
    """

    unit_mean: float
    mean_size: float
    predicted_mean_size: float
    std: float
    predicted_std: float
    mean_error: float
    drift: float | None


@dataclass(frozen=True)
class HiddenLayer:
    """A linear operation u = Wx with the activation behind it, at one moment of training.

    With rows of unit length and E xxᵀ = I Proposition 1 has ``error ≤ bound`` (Arpit et al. 2016); both are given as
    shares of ‖diag‖ = √m for the m rows, so that 1 means that what is neglected is as large as what is kept.

    Attributes:
        incoming: What enters the linear operation.
        preactivation: What enters the activation.
        coherence: Largest |cosine| between two filters.
        bound: ``μ√(m − 1)``, the right side of Proposition 1.
        error: Its left side: Frobenius norm of the cosines between different filters, over √m.
        correlation: The same of the measured correlations between different units, which Proposition 1 knows only for
            uncorrelated inputs.
        deviation: ``‖Cov u − diag v‖ / ‖diag v‖`` for measured Cov u and predicted variances v: all that the diagonal
            which normalises neglects, wrong variances included.
    """

    incoming: Agreement
    preactivation: Agreement
    coherence: float
    bound: float
    error: float
    correlation: float
    deviation: float


def hidden_layers(model: nn.Module, x: Tensor, *, batch_size: int = 100) -> list[HiddenLayer]:
    """Every hidden layer of a chain of linear operations, normalisers and activations, measured on standardised samples.

    Predictions assume a standard normal input, see `propagate`. A convolution's units are its channels, over samples and
    positions; a normaliser's batch statistics are its running ones.

    Args:
        model: a network without branches, of one linear operation before each activation and one at the end; converted
            networks may be among them. It is not changed.
        x: samples, ``(n, channels, ...)``.
        batch_size: samples at a time.

    Raises:
        NormPropError: for a network that isn't such a chain.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [layer] = hidden_layers(net, torch.randn(500, 4))
        >>> layer.error <= layer.bound
        True
    """
    batches = x.split(batch_size)
    report = inspect(model, batches)
    plain = fold(model) if lanes_in(model) else model
    linear = [module for module in plain.modules() if isinstance(module, _LINEAR)]
    places = [i for i, row in enumerate(report) if row.slope is not None]
    if len(linear) != len(places) + 1:
        raise NormPropError(
            f"Hidden layers are told apart in chains; {report.title} has {len(linear)} linear layers and {len(places)} "
            "activations.\n"
            "Use normprop.inspect for other networks."
        )
    covariances = _covariances(plain, [report[i].path for i in places], batches)
    return [
        _layer(report, place, module.weight, covariance)
        for place, module, covariance in zip(places, linear, covariances, strict=False)
    ]


def _layer(report: Report, place: int, weight: Tensor, covariance: Tensor) -> HiddenLayer:
    preactivation = report[place - 1]
    start = next(i for i in range(place - 1, 0, -1) if _is_linear(report[i]))
    rows = weight.detach().double().flatten(1)
    norms = rows.norm(dim=1, keepdim=True)
    unit = rows / torch.where(norms > 0, norms, 1.0)
    bound = canonical_error_bound(unit)
    size = len(unit) ** 0.5
    deviations = covariance.diagonal().sqrt()
    scale = torch.where(deviations > 0, deviations, 1.0)
    correlations = covariance / scale / scale[:, None]
    predicted = preactivation.predicted.var.double().flatten().expand(len(unit))
    return HiddenLayer(
        incoming=_agreement(report[start - 1]),
        preactivation=_agreement(preactivation),
        coherence=bound.coherence,
        bound=bound.bound / size,
        error=bound.error / size,
        correlation=_number((correlations - correlations.diagonal().diag()).norm()) / size,
        deviation=_number((covariance - predicted.diag()).norm() / predicted.norm()),
    )


def _is_linear(row: Row) -> bool:
    """Whether a row is a convolution or matrix product, as a module or as a function."""
    return row.operation.rpartition(".")[2].lower().startswith(("conv", "linear"))


def _agreement(row: Row) -> Agreement:
    found, predicted = row.measured, row.predicted
    assert found is not None
    std = _spread(predicted)
    return Agreement(
        unit_mean=_number(found.mean.flatten()[0]),
        mean_size=_number(found.mean.abs().mean()),
        predicted_mean_size=_number(predicted.mean.abs().mean()),
        std=_spread(found),
        predicted_std=std,
        mean_error=_number((found.mean - predicted.mean).square().mean().sqrt()) / std if std else 0.0,
        drift=row.drift,
    )


def _spread(moments: Moments) -> float:
    return _number(moments.var.mean().sqrt())


def _number(tensor: Tensor) -> float:
    return float(tensor.detach())


@torch.no_grad()
def _covariances(model: nn.Module, paths: Sequence[str], batches: Sequence[Tensor]) -> list[Tensor]:
    """Covariance between the channels of what enters the modules at `paths`, float64."""
    meters = {path: _CovarianceMeter() for path in paths}
    with _listening(model, meters), _evaluating(model):
        for batch in batches:
            model(batch)
    return [meters[path].covariance() for path in paths]


class _CovarianceMeter:
    """Sums over samples and positions."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(())
        self.products = torch.zeros(())

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        wide = inputs[0].double().movedim(1, 0).flatten(1)
        self.count += wide.shape[1]
        self.total = self.total + wide.sum(1)
        self.products = self.products + wide @ wide.T

    def covariance(self) -> Tensor:
        """`(channels, channels)`."""
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)


@contextmanager
def _listening(model: nn.Module, meters: dict[str, _CovarianceMeter]) -> Iterator[None]:
    handles = [model.get_submodule(path).register_forward_pre_hook(meter) for path, meter in meters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
