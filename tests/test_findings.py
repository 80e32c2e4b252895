"""What a report says of healthy and of faulty networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader, TensorDataset

import normprop
from normprop.inspection.histogram import Histogram
from normprop.lab.commands import main
from tests.zoo import FAST, SMALL, Residual, build

DEPTHS = (4, 12, 24)


def with_statistics_of(model: nn.Module, x: Tensor) -> nn.Module:
    """The network with running statistics measured on x."""
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.momentum = None
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    for _ in range(4):  # a layer that is called twice has the average of both
        model(x)
    return model.eval()


def plain(depth: int, seed: int, *, activation: type[nn.Module] = nn.ReLU, conv: bool = False) -> nn.Sequential:
    """A network without normalisers, initialised so that the signal keeps its size."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i in range(depth):
        layer = nn.Conv2d(8 if i else 3, 8, 3, padding=1, padding_mode="circular") if conv else nn.Linear(64, 64)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if activation is nn.ReLU else "tanh")
        nn.init.zeros_(layer.bias)
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def kinds(report: normprop.Report) -> set[str]:
    return {finding.kind for finding in report.findings}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("seed", range(2))
def test_healthy_small_networks_give_no_alarm(name: str, seed: int) -> None:
    make, shape = SMALL[name]
    torch.manual_seed(seed)
    x = torch.randn(256, *shape)
    assert normprop.propagate(make()).findings == ()
    assert normprop.inspect(normprop.calibrate(normprop.convert(make()), x), x).findings == ()
    if name != "shared":  # one BatchNorm under two moments has the statistics of neither
        assert normprop.inspect(with_statistics_of(make(), x), x).findings == ()


@pytest.mark.parametrize("name", FAST[:2])
def test_healthy_real_networks_give_no_alarm(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    assert normprop.propagate(model).findings == ()
    assert normprop.propagate(normprop.convert(model)).findings == ()


def test_a_converted_resnet_gives_no_alarm_on_data() -> None:
    torch.manual_seed(0)
    model, x = build("torchvision:resnet18"), torch.randn(8, 3, 64, 64)
    report = normprop.inspect(normprop.convert(model), x)
    assert report.findings == ()
    assert "Nothing to worry about" in report.table().splitlines()[0]
    assert normprop.inspect(with_statistics_of(model, x), x).findings == ()


def test_fresh_running_statistics_are_remarked_once_where_they_are_wrong() -> None:
    torch.manual_seed(0)
    model, x = Residual(), 20 * torch.randn(64, 3, 12, 12)
    report = normprop.inspect(model, x, input=normprop.InputStats.from_tensor(x))
    [finding] = [finding for finding in report.findings if finding.kind == "statistics"]
    assert finding.path == "stem.1"
    assert "drift" not in kinds(report)  # it follows


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("conv", [False, True])
def test_a_weight_times_40_is_remarked_at_its_place(depth: int, conv: bool) -> None:
    for seed in range(3):
        model = plain(depth, seed, conv=conv)
        place = 2 * int(torch.randint(depth, ()))
        with torch.no_grad():
            model[place].weight.mul_(40)
        x = torch.randn(64, *((3, 8, 8) if conv else (64,)))
        for report in (normprop.propagate(model), normprop.inspect(model, x)):
            first = report.findings[0]
            assert (first.kind, first.path, first.severity) == ("jump", str(place), "warning")
            before = report[place].known.var.mean().sqrt()
            assert first.value == pytest.approx(float(report[place + 1].known.var.mean().sqrt() / before), rel=1e-6)
            assert f"×{first.value:.3g}" in first.sentence
            assert str(place) in first.sentence
            assert report.verdict() == "\n".join(map(str, report.findings))


def test_before_a_normaliser_a_large_weight_is_a_note() -> None:
    model = SMALL["residual"][0]()
    with torch.no_grad():
        model.conv1.weight.mul_(40)  # type: ignore[union-attr, operator]
    [finding] = normprop.propagate(model).findings
    assert (finding.kind, finding.path, finding.severity) == ("jump", "conv1", "note")
    assert normprop.propagate(normprop.convert(model)).findings == ()  # a site does not feel the scale of its weight


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_plain_networks_that_keep_the_signal_give_no_alarm_by_prediction(activation: type[nn.Module]) -> None:
    for seed in range(3):
        assert normprop.propagate(plain(8, seed, activation=activation)).findings == ()


@torch.no_grad()
def faulty(kind: str) -> tuple[nn.Module, Tensor, str]:
    """A network with one fault, data, and the path of the fault."""
    model, x = plain(8, 1), torch.randn(256, 64)
    if kind == "explosion":
        for layer in model[::2]:
            layer.weight.mul_(2.5)
        return model, x, "14"
    if kind == "collapse":
        for layer in model[::2]:
            layer.weight.mul_(0.3)
        return model, x, "14"
    if kind == "dead":
        model[6].bias[:40] = -30.0
        return model, x, "7"
    if kind == "mean":
        model[6].bias.fill_(20.0)
        return model, x, "6"
    if kind == "saturated":
        model = plain(8, 1, activation=nn.Tanh)
        model[6].weight.mul_(8)
        return model, x, "7"
    if kind == "input":
        return model, 127 + 40 * x, ""
    if kind == "overflow":
        model[8].weight.mul_(float("inf"))
        return model, x, "8"
    model[0].weight.abs_()  # drift: inputs that vary together, and filters that add them up
    return model, x[:, :1].repeat(1, 64), "0"


@pytest.mark.parametrize("kind", ["explosion", "collapse", "dead", "mean", "saturated", "input", "overflow", "drift"])
def test_a_fault_is_found_at_its_place(kind: str) -> None:
    model, x, path = faulty(kind)
    found = {finding.kind: finding for finding in normprop.inspect(model, x).findings}
    assert kind in found, found
    assert found[kind].path == path
    if kind not in ("input", "drift"):  # these need data
        predicted = {finding.kind: finding for finding in normprop.propagate(model).findings}
        assert predicted[kind].path == path


def test_a_finding_says_nothing_twice() -> None:
    for kind in ("explosion", "input", "dead"):
        model, x, _ = faulty(kind)
        for finding in normprop.inspect(model, x).findings:
            clauses = [clause for clause in re.split("[.:;,] ", finding.sentence) if len(clause) > 12]
            assert len(clauses) == len(set(clauses))
            assert finding.sentence.count("predictions") <= 1


@pytest.mark.parametrize("beta", [-0.1, 0.0])
def test_a_site_that_magnifies_what_should_hardly_vary(beta: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        net[0].weight[3].abs_()
        net[1].weight[3], net[1].bias[3] = 0.02, beta
    x = torch.randn(256, 1).repeat(1, 16)  # inputs that vary together: the first layer's output varies 4 times as much
    findings = normprop.inspect(normprop.convert(net, center=False), x).findings
    assert [finding.path for finding in findings if finding.kind == "scarce"] == (["3"] if beta < 0 else [])
    if beta < 0:
        assert findings[0].kind == "scarce"
        assert "1 of 16 channels" in findings[0].sentence


def test_what_is_far_from_gaussian_is_noted() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    nn.init.eye_(net[0].weight)
    assert "shape" in kinds(normprop.inspect(net, torch.randn(1000, 16).sign()))
    assert "shape" not in kinds(normprop.inspect(net, torch.randn(1000, 16)))


def test_distance_of_a_histogram_from_a_gaussian() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2000, 5, 7, generator=generator)
    assert Histogram.of(3 * normal + 2).distance < 0.02
    assert sum(Histogram.of(normal).shares) == pytest.approx(1.0)
    uniform = torch.rand(20000, 1, generator=generator)
    # total variation of a uniform of variance 1: the shares beyond ±√3, and those by which it is flatter inside
    x = torch.linspace(-8, 8, 160001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    flat = (x.abs() < 3**0.5).double() / 12**0.5
    assert Histogram.of(uniform).distance == pytest.approx(float((density - flat).abs().sum() * 1e-4 / 2), abs=0.02)


def test_no_two_columns_have_one_heading(tmp_path: Path) -> None:
    report = normprop.inspect(plain(3, 0), torch.randn(64, 64))
    heading = report.table().split("\n\n")[1].splitlines()[0]
    names = [name for name in heading.split("  ") if name.strip()]
    assert len(names) == len({name.strip() for name in names})


def batches(form: str, x: Tensor) -> Any:
    y = torch.zeros(len(x), dtype=torch.long)
    halves = list(zip(x.split(32), y.split(32), strict=True))
    forms: dict[str, Callable[[], Any]] = {
        "tensor": lambda: x,
        "list of tensors": lambda: [a for a, _ in halves],
        "pairs": lambda: halves,
        "lists": lambda: [[a, b] for a, b in halves],
        "mappings": lambda: [{"input": a, "label": b} for a, b in halves],
        "iterator of pairs": lambda: iter(halves),
        "loader": lambda: DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True),
    }
    return forms[form]()


@pytest.mark.parametrize("form", ["tensor", "list of tensors", "pairs", "lists", "mappings", "iterator of pairs", "loader"])
def test_data_in_every_form_give_the_same_moments(form: str) -> None:
    torch.manual_seed(0)
    model, x = plain(3, 0), torch.randn(64, 64)
    state = torch.get_rng_state()
    expected, found = normprop.inspect(model, x), normprop.inspect(model, batches(form, x))
    if form != "loader":
        assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a.measured.mean, b.measured.mean)
        torch.testing.assert_close(a.measured.var, b.measured.var)


@pytest.mark.parametrize("data", [[], 3])
def test_no_data(data: Any) -> None:
    with pytest.raises(normprop.NormPropError):
        normprop.inspect(plain(3, 0), data)


class Within(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 64),
            nn.Hardshrink(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + 1


def lines(report: normprop.Report) -> Iterator[str]:
    for row in report[1:]:
        file, _, line = row.source.rpartition(":")
        assert file == __file__
        yield Path(file).read_text().splitlines()[int(line) - 1].strip()


def test_source_lines_name_the_line_of_the_layer() -> None:
    assert list(lines(normprop.propagate(Within()))) == ["nn.Linear(64, 64),", "nn.Hardshrink(),", "return self.body(x) + 1"]
    alone = nn.Sequential(
        nn.Linear(3, 4),
        nn.Softshrink(),
    )
    assert list(lines(normprop.propagate(alone))) == ["nn.Linear(3, 4),", "nn.Softshrink(),"]
    listed = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
    assert all("normprop.propagate(listed)" in line for line in lines(normprop.propagate(listed)))


def test_the_command_begins_with_the_verdict(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", "mlp", "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.startswith("Nothing to worry about")
    assert "Nothing to worry about" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("within", [True, False])
def test_what_is_not_finite_within_a_function_that_is_finite_is_nothing(within: bool) -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            y = x.log1p()
            return self.last(torch.where(x > 0, y, 0.5 * x) if within else y.abs().sqrt())

    torch.manual_seed(0)
    x = 3 * torch.randn(256, 16)
    found = [f for f in normprop.inspect(Logarithm(), x).findings if f.kind == "overflow"]
    assert len(found) == (not within)
