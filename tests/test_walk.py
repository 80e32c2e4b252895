from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop import Moments, NormPropError, TracingError, UnsupportedOpError
from normprop.graph.input_moments import input_moments
from normprop.graph.preparation import prepare
from normprop.precision import reference_tensor


def head(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = nn.Conv2d(3, 8, 3), nn.Linear(5, 8)
        self.norm, self.last = nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.last(self.norm(self.image(image).mean((2, 3)) + self.vector(vector)).relu())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.norm = nn.Embedding(20, 6), nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.conv(self.embed(ids).transpose(1, 2)))


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Grey(ChannelsLast):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.unsqueeze(1).repeat(1, 3, 1, 1)))


class Reshaping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(784, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x.reshape(x.shape[0], -1)))


FOUND = {
    "image": (head(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (3, 224, 224)),
    "28 × 28": (head(nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 24 * 24, 10)), (1, 28, 28)),
    "37 × 37": (head(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36 * 36, 10)), (3, 37, 37)),
    "series": (head(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)), (2, 224)),
    "volume": (head(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4)), (1, 16, 224, 224)),
    "vector": (head(nn.Linear(7, 4), nn.BatchNorm1d(4)), (7,)),
    "features first": (head(nn.BatchNorm1d(7), nn.Linear(7, 4)), (7,)),
    "tokens": (Tokens(), (224,)),
    "channels last": (ChannelsLast(), (224, 224, 3)),
    "grey": (Grey(), (224, 224)),
    "reshaping": (Reshaping(), (784,)),
}


@pytest.mark.parametrize(("model", "shape"), FOUND.values(), ids=list(FOUND))
def test_an_input_is_found(model: nn.Module, shape: tuple[int, ...]) -> None:
    ((found, dtype),) = prepare(model).inputs()
    assert found == shape
    assert dtype == (torch.long if isinstance(model, Tokens) else torch.float32)
    assert all(bool(row.predicted.var.isfinite().all()) for row in normprop.propagate(model))


def test_several_inputs() -> None:
    walk = prepare(Two())
    assert [shape for shape, _ in walk.inputs()] == [(3, 224, 224), (5,)]
    model = Two().double().eval()
    x, y = torch.randn(4, 3, 9, 9, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(normprop.convert(model, preserve=True)(x, y), model(x, y))
    assert prepare(Two(), shape=((3, 9, 9), (5,))).inputs()[0][0] == (3, 9, 9)


def test_all_unknown_operations_are_named_with_their_place() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(torch.sort(x)[0], 1)

    with pytest.raises(UnsupportedOpError) as caught:
        normprop.propagate(nn.Sequential(nn.Linear(3, 3), Odd(), nn.LSTM(3, 3)))
    message = str(caught.value)
    assert message.startswith("3 operations without a moment rule")
    assert all(name in message for name in ("cumsum", "sort", "LSTM", "test_walk.py:", "recurrence", "@normprop.rule"))
    assert len(caught.value.operations) == 3


def test_a_network_that_no_input_fits() -> None:
    with pytest.raises(TracingError, match="does not run on any input that was guessed"):
        normprop.propagate(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 6)))
    with pytest.raises(TracingError, match=r"does not run on an input of shape \(4,\)"):
        prepare(nn.Linear(3, 4), shape=(4,))


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(NormPropError, match="not seen its input"):
        normprop.propagate(nn.Sequential(nn.LazyLinear(3)))


BAD: dict[str, tuple[Any, str]] = {
    "channels": (Moments(torch.zeros(4), torch.ones(4)), "moments have shape"),
    "NaN": (Moments(torch.zeros(3), torch.tensor([1.0, float("nan"), 1.0])), "NaN"),
    "NaN mean": (Moments(torch.full((3,), float("nan")), torch.ones(3)), "NaN"),
    "negative": (Moments(torch.zeros(3), torch.tensor([1.0, -1.0, 1.0])), "negative"),
    "zero": (Moments(torch.zeros(3), torch.zeros(3)), "zero"),
    "several": ([Moments(torch.zeros(3), torch.ones(3))] * 2, "1 inputs"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=list(BAD))
def test_wrong_input_moments(given: Any, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(NormPropError, match=message):
        input_moments(prepare(model).shapes(), given, reference_tensor(model))


def test_input_moments_in_every_form() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    walk, like = prepare(model, shape=(3, 8, 8)), reference_tensor(model)
    for shape, expected in (((3,), (1, 3, 1, 1)), ((), (1, 3, 1, 1)), ((3, 8, 8), (1, 3, 8, 8))):
        (found,) = input_moments(walk.shapes(), Moments(torch.zeros(shape), torch.ones(shape)), like)
        assert found.mean.shape == expected


def test_half_precision_is_walked_in_single() -> None:
    assert reference_tensor(nn.Linear(2, 2).half()).dtype is torch.float32
    assert reference_tensor(nn.Linear(2, 2).double()).dtype is torch.float64
