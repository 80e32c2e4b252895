from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop.lab.commands import main
from tests.zoo import SMALL, Residual, build


@pytest.mark.parametrize("name", SMALL)
def test_every_predicted_row_is_measured(name: str) -> None:
    make, shape = SMALL[name]
    torch.manual_seed(0)
    for model in (make(), normprop.convert(make())):
        report = normprop.inspect(model, torch.randn(64, *shape))
        assert all(row.measured is not None for row in report)
        assert all(row.measured.mean.shape == row.predicted.mean.expand_as(row.measured.mean).shape for row in report)


def test_a_norm_with_an_activation_inside_is_measured_in_parts() -> None:
    torch.manual_seed(0)
    model = build("timm:resnetv2_50")
    x = torch.randn(2, 3, 64, 64)
    rows = {row.path: row for row in normprop.inspect(model, x)}
    norm, act = rows["stages.0.blocks.0.norm2"], rows["stages.0.blocks.0.norm2.act"]
    assert float(norm.measured.mean.mean()) < 0.1 < float(act.measured.mean.mean())


def test_smooth_images_break_independence_and_calibration_mends_it() -> None:
    torch.manual_seed(0)
    coarse = torch.randn(200, 3, 3, 3)
    x = nn.functional.interpolate(coarse, size=(12, 12), mode="bilinear")
    x = (x - x.mean()) / x.std()
    model = normprop.convert(Residual())

    def error() -> float:
        rows = [row for row in normprop.inspect(model, x) if row.operation == "Conv2d"]
        return max(float((row.measured.std / row.predicted.std).log2().abs().mean()) for row in rows)

    before = error()
    normprop.calibrate(model, x)
    assert error() < 0.01 < before


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "resnet8", "--width", "0.5", "--norm", "normprop", "--data", "digits", "--samples", "50"]) == 0
    assert "std (data)" in capsys.readouterr().out
    assert main(["inspect", "mlp", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert any(row["operation"] == "BatchNorm1d" for row in rows)
    assert main(["inspect", "--coverage", "timm:resnet18", "torchvision:vgg11"]) == 0
    assert "timm:resnet18" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "No network"), (["resnet8", "--samples", "1"], "--samples"), (["resnt8"], "resnet8")]
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("shared", [False, True])
def test_a_converted_network_with_values_in_its_forward_is_inspected(shared: bool) -> None:
    """Where recording needs values, it runs with the lane's weights."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.head = nn.Conv2d(8, 4, 1)
            self.seen: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            self.seen.append(x.std().item())
            return self.head(x) + (self.head(2 * x) if shared else 0.0)

    torch.manual_seed(0)
    model = normprop.convert(Counting())
    x = torch.randn(64, 3, 8, 8)
    report = normprop.inspect(model, x)
    (row,) = (row for row in report if row.operation == "Site")
    torch.testing.assert_close(row.measured.std, torch.ones_like(row.measured.std), rtol=0.2, atol=0.0)
    assert len(model.seen) == 1  # the one that measured
