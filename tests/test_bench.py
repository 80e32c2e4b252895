"""`normprop bench`: tables, JSON, a figure, its errors."""

import json
import re

import pytest
import torch

from normprop.errors import NormPropError
from normprop.lab.commands import main
from normprop.lab.cost.cost_report import CostReport

TINY = ("bench", "resnet8", "--width", "0.25", "--shape", "3x8x8", "--seconds", "0", "--threads", "1", "--skip-memory")


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_table_file_and_figure(tmp_path, capsys, monkeypatch):
    out, plot = tmp_path / "cost.json", tmp_path / "cost.png"
    options = ("--batch-size", "1", "2", "--against", "plain,batch", "group", "--out", str(out), "--plot", str(plot))
    assert main([*TINY, *options]) == 0
    captured = capsys.readouterr()
    for text in ("resnet8 on 3×8×8", "no normaliser", "BatchNorm", "GroupNorm", "moment lane", "conversion"):
        assert text in captured.out
    assert "\x1b" not in captured.out
    assert "batch size 2: training" in captured.err
    report = CostReport.load(out)
    assert report.rivals == ("plain", "batch", "group")
    assert [batch.batch_size for batch in report.batches] == [1, 2]
    assert report.workload.threads == 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    asked = {}

    def asked_for(workload, **options):
        asked.update(options, workload=workload)
        raise NormPropError("not measured again")

    monkeypatch.setattr("normprop.lab.commands.bench.measure_cost", asked_for)
    assert main(report.command.split()[1:]) == 2
    assert asked["workload"] == report.workload, "the command that is kept measures the same"
    assert (asked["batch_sizes"], asked["against"], asked["seconds"], asked["memory"]) == (
        (1, 2),
        [*report.rivals],
        0,
        False,
    )


@pytest.mark.parametrize("form", ["--json", "--markdown"])
def test_other_forms(form, capsys):
    options = ("--width", "1", "--batch-size", "1", "--against", "plain", "--accumulate", "2", "--channels-last")
    assert main([*TINY, *options, form]) == 0
    out = capsys.readouterr().out
    if form == "--json":
        found = CostReport.from_dict(json.loads(out))
        assert (found.workload.accumulate, found.workload.channels_last) == (2, True)
    else:
        assert "channels-last resnet8" in out
        assert "2 batches to a step" in out
        assert re.search(r"\| +1 \| no normaliser +\|", out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "none"), "Unknown contender"),
        (("--shape", "3x32xx"), "isn't the shape"),
        (("--shape", "0x3"), "isn't the shape"),
        (("--accumulate", "0"), "count from 1"),
        (("--device", "nowhere"), "can't be used"),
        (("--out", "{folder}"), "is a folder"),
        (("--plot", "{folder}"), "is a folder"),
        (("--plot", "cost.gif"), "ends in .png"),
    ],
)
def test_errors_are_a_line_and_a_remedy(options, message, tmp_path, capsys):
    options = [option.replace("{folder}", str(tmp_path)) for option in options]
    assert main([*TINY, "--batch-size", "1", "--against", "plain", *options]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert message in " ".join(errors)
    assert errors[0].startswith("normprop: ")
    assert len(errors) == 2
