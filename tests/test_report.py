"""The report as a page and as a figure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import normprop
from normprop import Moments, NormPropError, Report
from normprop.inspection.row import Row
from normprop.lab.commands import main
from tests.zoo import SMALL


class Reader(HTMLParser):
    """Cells of the table with their attributes; every tag that opens must close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.styles: list[dict[str, str | None]] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for key, value in attrs if key in ("src", "href", "action")]
        if tag in ("meta", "link", "input"):
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.styles.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if (self.open and self.open[-1] in ("td", "th")) or self.open[-2:] == ["th", "button"]:
            self.rows[-1][-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def off_by(factor: float) -> Row:
    """A row whose measured standard deviation is so many times the predicted one."""
    predicted = Moments(torch.zeros(1, 3), torch.ones(1, 3))
    return Row(
        "a", "<b>&.c", "Linear", "approximate", 'says "why"', "net.py:1", (2, 3), predicted,
        slope=1.5, sensitivity=4.0, measured=Moments(torch.full((1, 3), 0.25), torch.full((1, 3), factor**2)),
    )  # fmt: skip


def test_drift_is_in_octaves() -> None:
    assert off_by(4.0).drift == pytest.approx(2.0)
    assert off_by(0.5).drift == pytest.approx(1.0)
    assert normprop.propagate(nn.Linear(3, 3))[0].drift is None
    uneven = Row("a", "", "", "exact", "", "", (), Moments(torch.zeros(2), torch.tensor([1.0, 0.0])), measured=Moments(
        torch.zeros(2), torch.tensor([4.0, 1.0])))  # fmt: skip
    assert uneven.drift == pytest.approx(1.0)  # what was predicted constant has no octaves


def test_cells_say_what_the_row_says() -> None:
    reader = read(Report([off_by(2.0), off_by(1.0)], "Net & <more>").to_html())
    assert reader.rows[1] == ["<b>&.c", "Linear", "2 × 3", "0", "1", "0.25", "2", "1", "1.5", "2", "", "≈"]
    assert any(s.get("title") == 'says "why"' for s in reader.styles)


def test_the_worst_row_is_the_one_that_drifted_furthest() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    assert normprop.propagate(model).worst is None
    report = normprop.inspect(model, torch.randn(100, 3))
    assert report.worst is not None
    assert report.worst.drift == max(row.drift for row in report)


@pytest.mark.parametrize("name", SMALL)
def test_the_page_stands_alone(name: str, tmp_path: Path) -> None:
    make, shape = SMALL[name]
    for data in (None, torch.randn(8, *shape)):
        report = normprop.inspect(make(), data)
        report.save_html(tmp_path / "report.html")
        text = (tmp_path / "report.html").read_text(encoding="utf-8")
        reader = read(text)
        assert len(reader.rows) == len(report) + 1
        assert len({len(row) for row in reader.rows}) == 1
        assert reader.links == []
        assert not any(word in text for word in ("<script src", "@import", "url("))
        assert ("std (data)" in reader.rows[0]) is (data is not None)
        held = json.loads(text.split('id="data">')[1].split("</script>")[0])
        assert [row["name"] for row in held["rows"]] == [row.name for row in report]
        known = {row["name"] for row in held["rows"]}
        assert all(row["inputs"] and set(row["inputs"]) <= known for row in held["rows"] if row["role"] != "input")
        for row, kept in zip(report, held["rows"], strict=True):
            channels = row.predicted.std.flatten().tolist()
            assert kept["channels"]["predicted_std"] == pytest.approx(channels, rel=1e-3)


def test_the_figure_shows_the_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(32, 32), nn.ReLU())])
    report = normprop.inspect(model, torch.randn(64, 32))
    figure = report.plot()
    spread, mean, growth = figure.axes
    for axes, key in ((spread, "std"), (mean, "mean")):
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
        assert lines["predicted"] == [row.to_dict()["predicted"][key] for row in report]
        assert lines["measured"] == [row.to_dict()["measured"][key] for row in report]
    assert list(growth.get_lines()[0].get_ydata()) == pytest.approx([row.sensitivity**0.5 for row in report])
    assert spread.get_yscale() == "log"
    assert [label.get_text() for label in growth.get_xticklabels()][1] == report[2].path
    normalised = nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())])
    spread, _, growth = normprop.propagate(normalised).plot().axes
    assert (spread.get_yscale(), growth.get_yscale()) == ("linear", "log")
    assert len(spread.get_lines()) == 1


@pytest.mark.parametrize("size", [3.0, 1e4, float("inf")])
def test_the_figure_survives_an_exploding_network(size: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(16, 16), nn.ReLU())])
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(size)
    report = normprop.propagate(model)
    _, mean, _ = report.plot().axes
    assert mean.get_yscale() == (
        "symlog" if any(abs(row.to_dict()["predicted"]["mean"]) > 10 for row in report) else "linear"
    )
    assert all(math.isfinite(end) for end in mean.get_ylim())
    drawn = [y for y in mean.get_lines()[0].get_ydata() if y == y]
    heights = mean.transData.transform([(0, y) for y in drawn])[:, 1]
    if size == 1e4:  # small means are told apart beside large ones
        assert len({round(height) for height in heights}) > 8
    report.save_plot(tmp_path / "figure.png")


def test_the_command_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, plot = tmp_path / "r.html", tmp_path / "r.svg"
    assert main(["inspect", "mlp", "--html", str(html), "--plot", str(plot)]) == 0
    assert "BatchNorm1d" in html.read_text(encoding="utf-8")
    assert "<svg" in plot.read_text(encoding="utf-8")
    assert "sens." in capsys.readouterr().out
    assert main(["inspect", "mlp", "--html", str(tmp_path / "none" / "r.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_what_cannot_be_written_or_drawn(tmp_path: Path) -> None:
    report = normprop.propagate(nn.Linear(3, 3))
    with pytest.raises(NormPropError, match="cannot be written"):
        report.save_plot(tmp_path / "figure.unknown")
    with pytest.raises(NormPropError, match="cannot be written"):
        report.save_html(tmp_path)
    code = (
        "import sys; sys.modules['matplotlib'] = None\nimport torch, normprop\n"
        "try: normprop.propagate(torch.nn.Linear(3, 3)).plot()\nexcept normprop.NormPropError as e: print(e)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "normprop[plot]" in run.stdout


def test_what_was_walked_cannot_end_a_script() -> None:
    text = Report([off_by(2.0)], "</script><b>").to_html()
    assert "</script><b>" not in text
    read(text)


def test_a_page_holds_the_licences_of_what_it_uses() -> None:
    text = normprop.propagate(nn.Linear(3, 3)).to_html()
    for holder in ("The Cytoscape Consortium", "Chris Pettitt"):
        assert holder in text
    folder = Path(normprop.__file__).parent / "inspection" / "viewer"
    for library in folder.glob("*.min.js"):
        assert (folder / f"{library.name.removesuffix('.min.js')}.LICENSE").exists()


def test_a_log_that_is_none(tmp_path: Path) -> None:
    report = normprop.propagate(nn.Linear(3, 3))
    (tmp_path / "log.jsonl").write_text("no json")
    for log in ([], [{"loss": 1.0}], tmp_path / "log.jsonl", tmp_path / "none.jsonl"):
        with pytest.raises(NormPropError, match="log"):
            report.to_html(log)


@pytest.mark.parametrize("name", ["residual", "mlp", "sequence", "decoder"])
def test_node_data_for_model_explorer(name: str) -> None:
    make, shape = SMALL[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(8, *shape)
    program = torch.export.export(model, (x,))
    report = normprop.inspect(model, x)
    expected = {row.path: row for row in report if row.role in ("linear", "normaliser")}
    [graph] = json.loads(report.to_json(overlay=program)).values()
    nodes = {node.name: node for node in program.graph.nodes}
    assert graph["results"].keys() <= nodes.keys()
    found = {}
    for node_name, entry in graph["results"].items():
        path = [path for path, _ in nodes[node_name].meta["nn_module_stack"].values()][-1]
        found[path] = entry["value"]
    assert expected.keys() <= found.keys()
    for path, row in expected.items():
        assert found[path] == pytest.approx(row.to_dict()["measured"]["std"])
    drifts = json.loads(report.to_json(overlay=program, value="drift"))["graph"]["results"]
    assert {entry["value"] for entry in drifts.values()} <= {row.drift for row in report}
    with pytest.raises(NormPropError, match="value"):
        report.to_json(overlay=program, value="size")  # type: ignore[arg-type]
    with pytest.raises(NormPropError, match="exported"):
        report.to_json(overlay=torch.export.export(nn.Softmax(1), (torch.randn(2, 3),)))
