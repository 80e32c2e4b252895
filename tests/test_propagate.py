from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normprop
from normprop import Moments, NormPropError
from tests.zoo import SMALL, Residual


def test_a_chain_matches_monte_carlo_through_the_real_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 200), nn.GELU(), nn.Linear(200, 50)).double()
    report = normprop.inspect(model, torch.randn(20_000, 300, dtype=torch.float64))
    for row in report:
        assert row.measured is not None
        off = (row.measured.mean - row.predicted.mean).square().mean().sqrt() / row.predicted.std.mean()
        assert float(off) < 0.03, row.path  # exact up to the correlation that 300 random rows leave
        assert float((row.measured.std / row.predicted.std).log2().square().mean().sqrt()) < 0.12, row.path


def test_a_row_says_where_and_what() -> None:
    report = normprop.propagate(Residual())
    rows = {row.name: row for row in report}
    assert rows["stem_0"].path == "stem.0"
    assert rows["stem_0"].operation == "Conv2d"
    assert rows["gelu"].source.rpartition(":")[0].endswith("zoo.py")
    assert rows["mean"].standing == "approximate"
    assert rows["mean"].reason
    assert report.approximate
    assert rows["stem_0"].shape[:2] == (2, 8)


def test_slopes_multiply_along_a_chain() -> None:
    layers: list[nn.Module] = []
    for _ in range(10):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    report = normprop.propagate(nn.Sequential(*layers))
    relu = 1 / (1 - 1 / torch.pi)  # E f'² / Var f of ReLU at N(0, 1): ½ / (½ (1 − 1/π))
    assert [row.slope for row in report if row.slope is not None] == [pytest.approx(relu)] * 10
    assert report[-1].sensitivity == pytest.approx(relu**10, rel=0.05)


class Branch(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.norm, self.weight = nn.BatchNorm1d(8), weight

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.weight**2) ** 0.5 * x + self.weight * self.norm(torch.relu(x))


def test_a_residual_sum_weights_its_paths_by_their_variance() -> None:
    report = normprop.propagate(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), Branch(0.5)))
    start = next(row for row in report if row.operation == "BatchNorm1d").sensitivity
    assert report[-1].sensitivity == pytest.approx(start * (0.75 + 0.25 * 1.467), rel=1e-3)


def test_sensitivity_is_what_a_small_change_does() -> None:
    torch.manual_seed(0)
    model = normprop.convert(
        nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(400, 400), nn.BatchNorm1d(400), nn.GELU())])
    )
    model = model.double()
    x = torch.randn(256, 400, dtype=torch.float64)
    change = 1e-5 * torch.randn_like(x)
    ratio = float((model(x + change) - model(x)).detach().var() / change.var() / model(x).detach().var())
    assert normprop.propagate(model)[-1].sensitivity == pytest.approx(ratio, rel=0.15)


class Places(nn.Module):
    """Places differ until a normaliser gives all of them one variance; then they are averaged."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.end = nn.Conv2d(200, 64, 1), norm, nn.Linear(64, 50)
        self.place = nn.Parameter(torch.randn(1, 64, 3, 3) * 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.gelu(self.conv(x) + self.place))
        return self.end(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(64), nn.GroupNorm(4, 64)], ids=lambda m: type(m).__name__)
def test_what_a_change_does_where_places_differ(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model = Places(norm).double()
    x = torch.randn(2000, 200, 3, 3, dtype=torch.float64)
    if isinstance(norm, nn.BatchNorm2d):
        norm.momentum = 1.0
    model(x)
    rows = {row.name: row for row in normprop.propagate(model.eval())}
    assert all(row.predicted.mean.shape == row.predicted.var.shape for row in rows.values())
    change = 1e-5 * torch.randn_like(x)
    before: list[Tensor] = []
    norm.register_forward_hook(lambda *given: before.append(given[2].detach()))
    model(x), model(x + change)
    row = next(row for name, row in rows.items() if "norm" in name)
    together = [d for d, size in enumerate(row.predicted.var.shape) if size == 1]
    ratio = float((before[1] - before[0]).var() / change.var() / before[0].var(together).mean())
    assert row.sensitivity == pytest.approx(ratio, rel=0.15)


def test_dropout_counts_in_training_only() -> None:
    model = nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.5))
    variances = [normprop.propagate(model.train(mode))[-1].predicted.var.mean() for mode in (True, False)]
    first = normprop.propagate(model)[1].predicted
    assert float(variances[1]) == pytest.approx(float(first.var.mean()))
    assert float(variances[0]) == pytest.approx(float(((first.var + 0.5 * first.mean**2) / 0.5).mean()))


@pytest.mark.parametrize("name", SMALL)
def test_the_report_can_be_written(name: str) -> None:
    report = normprop.propagate(SMALL[name][0]().eval())
    assert len(json.loads(report.to_json())["rows"]) == len(report)
    verdict, text = report.table().split("\n\n", 1)
    assert verdict == report.verdict()
    table = text.splitlines()
    assert len(table) == len(report) + 2
    assert max(map(len, table)) < 160


def test_a_converted_network_reports_what_its_sites_claim() -> None:
    model = normprop.convert(Residual())
    with torch.no_grad():
        model.bn1.weight.fill_(2.0)
        model.bn1.bias.fill_(-1.0)
    rows = [row for row in normprop.propagate(model) if row.operation == "Conv2d"]
    assert any(
        torch.allclose(r.predicted.var, torch.tensor(4.0)) and torch.allclose(r.predicted.mean, -torch.ones(1)) for r in rows
    )


def test_input_moments() -> None:
    model = nn.Linear(3, 5).double()
    given = Moments(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0]))
    row = normprop.propagate(model, given)[-1]
    w = model.weight.detach()
    torch.testing.assert_close(row.predicted.mean[0], w @ given.mean.double() + model.bias.detach())
    torch.testing.assert_close(row.predicted.var[0], w**2 @ given.var.double())


def test_rules_for_one_call() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    row = normprop.propagate(model, rules={nn.ReLU: lambda module, x: x.scaled(3.0)})[-1]
    assert float(row.predicted.var.mean()) == pytest.approx(
        9 * float(normprop.propagate(model)[1].predicted.var.mean()), rel=1e-5
    )


def test_measured_needs_data() -> None:
    with pytest.raises(NormPropError, match="no data"):
        normprop.inspect(Residual(), [])


def test_inspect_leaves_the_model_as_it_was() -> None:
    model = Residual().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = normprop.inspect(model, [torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)])
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(row.measured is not None for row in report)


class WrittenTo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x) ** 2
        y[:, :1] *= 2.0
        return torch.relu(x) * y


def test_writing_to_a_part_does_not_make_it_independent() -> None:
    rows = normprop.propagate(nn.Sequential(nn.Linear(4, 4), WrittenTo()))
    assert rows[-1].operation.endswith("mul")
    assert rows[-1].standing == "approximate"
    assert "one tensor" in rows[-1].reason


class Tangled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x) * x.mean(1, keepdim=True)
        return x * gate


def test_functions_of_one_tensor_are_not_called_independent() -> None:
    rows = normprop.propagate(nn.Sequential(nn.Linear(4, 4), Tangled()))
    assert [row.standing for row in rows if row.operation.endswith("mul")] == ["approximate"] * 2
    assert "one tensor" in rows[-1].reason
    residual = [row for row in normprop.propagate(Residual()) if row.operation.endswith("add")]
    assert [row.standing for row in residual] == ["exact", "exact"]


class ByConstants(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / x.shape[1]) ** 2 / (3 * x.mean(1, keepdim=True))


def test_standing_depends_on_the_arguments() -> None:
    rows = normprop.propagate(nn.Sequential(nn.Linear(4, 4), ByConstants()))
    standing = {row.name: row.standing for row in rows}
    names = [name for name in standing if "div" in name or "pow" in name]
    assert tuple(standing[name] for name in names) == ("exact", "exact", "approximate")


class WrittenOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))


@pytest.mark.parametrize("activation", [nn.GELU(), WrittenOut()])
def test_slopes_of_smooth_activations(activation: nn.Module) -> None:
    report = normprop.propagate(activation, example=torch.zeros(2, 3))
    slope = report[-1].slope
    exact = normprop.moments("gelu")
    assert slope == pytest.approx(float(exact.slope / exact.var), rel=1e-5)


class WithToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)


def test_a_parameter_expanded_over_samples_is_the_same_for_all() -> None:
    model = WithToken()
    predicted = normprop.propagate(model, example=torch.zeros(3, 5, 4))[-1].predicted
    assert predicted.mean.shape == (1, 6, 4)
    torch.testing.assert_close(predicted.mean[:, :1], model.token.detach())
    assert predicted.var[0, :, 0].tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
