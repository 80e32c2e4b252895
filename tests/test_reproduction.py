"""The paper's experiments: their settings, what they share, what a kill leaves, and that results hold both numbers."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys

import pytest

from normprop.errors import NormPropError
from normprop.inspection.hidden_layers import Agreement, HiddenLayer
from normprop.lab.commands import main
from normprop.lab.comparison import records, workers
from normprop.lab.comparison.records import RUNS, Record
from normprop.lab.figures.reproduction_figure import PLOTS
from normprop.lab.pages.marked_page import filled
from normprop.lab.reproduction import account, outcome, published
from normprop.lab.reproduction.experiment_tables import HEADINGS, PARTS, TABLES, shown_epochs
from normprop.lab.reproduction.results_page import skeleton
from normprop.lab.reproduction.runs import CONTENDERS, cells, probed, rate, recipe, runs
from normprop.lab.reproduction.scale import SCALES, Schedule
from normprop.lab.reproduction.speed import measure_speed
from normprop.lab.reproduction.watcher import ProbeSome
from normprop.lab.samples.datasets import load
from normprop.lab.training.history import Row
from normprop.lab.training.loop import train

FULL, QUARTER, SMOKE = (SCALES[name] for name in ("full", "quarter", "smoke"))
TINY = dataclasses.replace(
    SMOKE, width=0.03, train_images=250, validation=40, usual=Schedule(2, 1), probed=20, speed_seconds=0
)
COMMAND = ["reproduce", "fig3", "--scale", "smoke", "--jobs", "1", "--out", "here"]


def every(part, scale=FULL, seeds=3):
    return [run for cell in cells(part, scale, seeds).values() for run in cell]


LAYER = HiddenLayer(Agreement(0.5, 0.6, 0.1, 2.0, 1.0, 0.5, 1.0), Agreement(-0.25, 0.3, 0.2, 1.5, 1.0, 0.1, 0.6),
                    coherence=0.5, bound=3.0, error=0.75, correlation=2.5, deviation=6.0)  # fmt: skip


def record(run, *, value=0.5, diverged=False):
    """A run as if it had been done: validation accuracy rises to `value`, the test error is one less; equal layers."""
    last = None if diverged else value
    rows = [
        Row(e, 10 * e, 0.1, 1.0, 0.5, last if e == run.epochs else None, 1.0, 10.0, diverged and e == run.epochs,
            last if e == run.epochs else value * e / run.epochs)
        for e in range(1, run.epochs + 1)
    ]  # fmt: skip
    watched = run in probed(FULL) | probed(QUARTER)
    layers = [dataclasses.asdict(LAYER), dataclasses.asdict(LAYER)]
    findings = [{"epoch": epoch, "layers": layers} for epoch in range(run.epochs + 1)] if watched else []
    return Record(run, tuple(rows), 10, 7.0, {"torch": "0"}, tuple(findings))


# What the paper's settings are.


@pytest.mark.parametrize("part", ["fig2", "fig3", "bound"])
def test_full_scale_is_the_papers_setting(part):
    for run in every(part):
        assert (run.data, run.model, run.width) == ("cifar10", "nin", 1.0)
        assert (run.batch_size, run.epochs, run.schedule, run.halve_every) == (50, 200, "halving", 25)
        assert (run.momentum, run.weight_decay, run.train_images) == (0.9, 5e-4, None)
        assert (run.flips, run.crops, run.data_norm) == (False, 0, "global")
        assert run.lr == (0.05 if run.norm != "none" else pytest.approx(1e-4 if run.lr < 0.001 else 0.01))


def test_the_papers_method_is_not_clipped_and_beside_it_stand_the_others():
    found = {name: recipe(FULL, name) for name in CONTENDERS}
    assert [run.norm for run in found.values()] == ["paper", "paper", "normprop", "batch", "none"]
    assert [bool(run.clip) for run in found.values()] == [False, True, True, False, False]


def test_figure_1_has_its_own_schedule_and_both_rates():
    for (_, mode, size), (run,) in cells("fig1", FULL, 3).items():
        assert (run.data_norm, run.batch_size, run.halve_every) == (mode, size, 10)
        if run.norm != "none":
            assert run.lr == {50: 0.05, 100: 0.08}[size]


def test_figure_4_has_four_batch_sizes_and_larger_rates_for_larger_ones():
    sizes = {size for _, size in cells("fig4", FULL, 3)}
    assert sizes == {1, 50, 100, 250} == published.BATCH_SIZES.keys()
    assert ("batch", 1) not in cells("fig4", FULL, 3)
    rates = [rate(size) for size in sorted(sizes)]
    assert rates == sorted(rates)
    assert rates[1:3] == [0.05, 0.08]


def test_table_1_has_every_cell_of_the_papers():
    keys = {(data, flips) for data, flips, _ in cells("table1", FULL, 3)}
    assert keys == published.TEST_ERROR.keys()
    for (data, flips, _), found in cells("table1", FULL, 3).items():
        assert all((run.data, run.flips) == (data, flips) for run in found)
        svhn = data == "svhn"
        expected = (100, 25, 5) if svhn else (50, 200, 25)
        assert all((run.batch_size, run.epochs, run.halve_every) == expected for run in found)
        assert all(run.lr == (0.08 if svhn else 0.05) for run in found if run.norm != "none")


def test_published_numbers():
    assert published.TEST_ERROR["cifar10", True] == {"paper": 7.47, "batch": 7.25}
    assert published.TEST_ERROR["svhn", False] == {"paper": 1.88, "batch": 2.25}
    assert published.EPOCH_SECONDS["paper"] / published.EPOCH_SECONDS["batch"] == 0.875


# What is shared, and in which order.


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_shared_runs_are_done_once(scale):
    together = runs(PARTS, scale, 3)
    assert len(together) == len(set(together)) < sum(len(every(part, scale)) for part in PARTS)
    assert set(together) == {run for part in PARTS for run in every(part, scale)}
    assert set(every("fig3", scale)) < set(every("fig4", scale))
    assert set(every("bound", scale)) < set(every("fig3", scale))
    assert {run for run in every("table1", scale) if not run.flips} >= set(every("fig3", scale))
    first = [run.seed for run in together if run.data == scale.data[0]]
    assert first == sorted(first), "whole rounds of seeds"


def test_seeds():
    assert {len(cell) for cell in cells("fig3", QUARTER, QUARTER.with_seeds(None)).values()} == {3}
    assert {run.seed for run in every("fig4", QUARTER, QUARTER.with_seeds(2))} == {0, 1}
    with pytest.raises(NormPropError, match="--seeds is 0"):
        QUARTER.with_seeds(0)


# What is measured in hidden layers.


def test_hidden_layers_are_measured_whoever_asks_for_the_run(tmp_path):
    images, watch = load("digits"), ProbeSome(probed(TINY), TINY.probed)
    wanted = [recipe(TINY, "paper"), recipe(TINY, "paper", batch_size=250)]
    workers.work(wanted, tmp_path, images=images, watch=watch)
    watched, other = records.read(tmp_path / RUNS)
    assert watched.recipe in every("fig3", TINY)
    assert [entry["epoch"] for entry in watched.findings] == [0, 1, 2]
    assert {len(entry["layers"]) for entry in watched.findings} == {8}
    assert other.findings == ()
    plain = train(wanted[0], images=images)
    unwatched = [dataclasses.replace(row, seconds=0, images_per_second=0) for row in plain.rows]
    assert unwatched == [dataclasses.replace(row, seconds=0, images_per_second=0) for row in watched.rows]


# What tables and figures say.


@pytest.mark.parametrize("part", [part for part in PARTS if part != "speed"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_tables_and_figures_of_whatever_is_finished(part, share):
    wanted = runs(PARTS, QUARTER, 2)
    done = [record(run) for run in wanted[: round(share * len(wanted))]]
    found = outcome.found(cells(part, QUARTER, 2), done)
    table = TABLES[part](found, QUARTER)
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert PLOTS[part](found, "title").axes
    left = account.progress(part, QUARTER, 2, done)
    assert (left == "") == ({run.recipe for run in done} >= set(every(part, QUARTER, 2)))


def test_both_numbers_stand_in_a_row():
    values = {"paper": 0.91, "paper-clip": 0.9, "normprop": 0.92, "batch": 0.905, "none": 0.8}
    done = [
        record(run, value=values[name] + 0.01 * run.seed)
        for (_, _, name), cell in cells("table1", QUARTER, 3).items()
        for run in cell
    ]
    table = TABLES["table1"](outcome.found(cells("table1", QUARTER, 3), done), QUARTER)
    (row,) = [row for row in table.rows if row[:2] == ["cifar10", "none"]]
    error = statistics.mean(100 * (1 - 0.91 - 0.01 * seed) for seed in range(3))
    assert f"{error:.1f} ± 1.0" in row
    assert row[-2:] == ["9.11", "9.41"]
    (line,) = [line for line in table.markdown().splitlines() if line.startswith("| cifar10") and "| none" in line]
    assert [cell.strip() for cell in line.strip("|").split("|")] == row


def test_figure_3_compares_with_batchnorm_at_the_papers_epochs():
    assert shown_epochs(FULL)[:5] == list(published.CURVES["paper"])
    done = [record(run, value=0.9 if run.norm == "paper" else 0.8) for run in every("fig3", FULL)]
    table = TABLES["fig3"](outcome.found(cells("fig3", FULL, 3), done), FULL)
    by_name = {row[0]: row[1:] for row in table.rows}
    assert by_name["lead of NormProp as printed over BatchNorm"][-1] == "+10.0"
    assert by_name["lead of NormProp as printed over BatchNorm"][0] == f"{90 * 5 / 200 - 80 * 5 / 200:+.1f}"
    assert "78.7 (epoch 5)" in table.note
    assert "9.9 (epoch 5)" in table.note


def test_hidden_layers_in_tables():
    done = [record(run) for run in every("fig2", FULL)]
    rows = {row[0]: row[1:] for row in TABLES["fig2"](outcome.found(cells("fig2", FULL, 1), done), FULL).rows}
    assert rows["NormProp as printed"] == ["0.25", "0", "0.3", "0.2", "1.5", "1", "0.6", "0.19"]
    assert rows["BatchNorm"][-1] == "0.33"
    assert rows["no normaliser, rate 1e-4"][-1] == "tens"
    table = TABLES["bound"](outcome.found(cells("bound", FULL, 1), done), FULL)
    assert table.rows == [[str(i), "0.5 → 0.5", "3 → 3", "0.75 → 0.75", "2.5 → 2.5", "6 → 6"] for i in (1, 2)]
    diverged = [record(run, diverged=run.norm == "paper" and not run.clip) for run in every("bound", FULL)]
    assert "printed, clipped" in TABLES["bound"](outcome.found(cells("bound", FULL, 1), diverged), FULL).note


def test_divergence_is_said():
    done = [record(run, diverged=run.norm == "paper" and not run.clip and run.seed == 1) for run in every("fig4", QUARTER)]
    found = outcome.found(cells("fig4", QUARTER, 3), done)
    rows = {row[0]: row[1:] for row in TABLES["fig4"](found, QUARTER).rows}
    assert all(cell.endswith("(1 diverged)") for cell in rows["NormProp as printed"])
    assert rows["NormProp as printed, clipped"][1] == "50.0 ± 0.0"
    assert rows["BatchNorm"][0] == "–"
    epochs = {row[0]: row[1:] for row in TABLES["fig3"](outcome.found(cells("fig3", QUARTER, 3), done), QUARTER).rows}
    assert epochs["NormProp as printed"][-1] == "50.0 ± 0.0 (1 diverged)"


def test_intervals_are_students():
    mean, half = outcome.interval([80.0, 82.0, 87.0])
    assert (mean, half) == (83.0, pytest.approx(4.302653 * statistics.stdev([80, 82, 87]) / 3**0.5, rel=1e-6))


def test_speed_is_relative_to_batchnorm():
    measured = measure_speed(TINY, load("digits"), "cpu")
    assert measured["batch"]["ratio"] == [1.0, 1.0, 1.0]
    assert all(measured[name]["epoch_seconds"][1] > 0 for name in CONTENDERS)
    assert measured["steps"] == 250 // 50
    assert "0.875 (84 s)" in TABLES["speed"](measured, TINY).markdown()
    assert PLOTS["speed"](measured, "title").axes


def test_what_was_not_run_is_listed():
    text = account.not_run(QUARTER, 3, [], timed=False)
    assert all(word in text for word in ("cifar100", "svhn", "--scale full", *HEADINGS.values()))
    done = [record(run) for run in runs(PARTS, FULL, 1)]
    assert account.not_run(FULL, 1, done, timed=True) == "Everything was run."


# The page.


def test_prose_survives_a_new_filling():
    page = filled(skeleton(), {"fig1": "old table"})
    page = page.replace("## Figure 2", "What the author says of figure 1.\n\n## Figure 2")
    again = filled(page, {"fig1": "new table", "fig3": "another"})
    assert "What the author says of figure 1." in again
    assert "new table" in again
    assert "old table" not in again
    assert again.index("new table") < again.index("What the author says") < again.index("another")


# The command.


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SCALES, "smoke", TINY)


def test_the_command_goes_on_after_a_kill_and_ends_with_results(tiny, tmp_path, monkeypatch, capsys):
    trained = []

    def third(run, **options):
        trained.append(run)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(run, **options)

    monkeypatch.setattr(workers, "train", third)
    assert main(COMMAND) == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "here" / "fig3.md").exists()
    assert main([*COMMAND, "--report", "page.md"]) == 0
    assert sorted(map(repr, trained[:2] + trained[3:])) == sorted(map(repr, runs(("fig3",), TINY, 1)))
    text = (tmp_path / "here" / "fig3.md").read_text()
    paper = next(run for run in records.read(tmp_path / "here" / RUNS) if run.recipe.norm == "paper" and not run.recipe.clip)
    assert f"{outcome.last(paper):.1f}" in text
    assert "90.2 (epoch 50)" in text
    assert (tmp_path / "here" / "fig3.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "here" / "fig3.json").read_text())
    assert len(found["runs"]) == len(CONTENDERS)
    page = (tmp_path / "page.md").read_text()
    assert "](here/fig3.png)" in page
    assert f"{len(CONTENDERS)} of {len(CONTENDERS)} runs are finished" in page
    trained.clear()
    assert main([*COMMAND, "--summary-only"]) == 0
    assert main(COMMAND) == 0
    assert not trained


def test_mistakes_are_named(tiny, capsys):
    assert main([*COMMAND, "--seeds", "0"]) == 2
    assert "--seeds is 0" in capsys.readouterr().err
    assert main(["reproduce", "fig3", "--jobs", "0"]) == 2
    assert "--jobs is 0" in capsys.readouterr().err


@pytest.mark.slow
def test_all_of_smoke(tmp_path):
    options = ["--scale", "smoke", "--out", str(tmp_path), "--report", str(tmp_path / "page.md")]
    command = [sys.executable, "-m", "normprop", "reproduce", "all", *options]
    subprocess.run(command, check=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for part in PARTS:
        assert (tmp_path / f"{part}.png").stat().st_size > 10_000
        assert json.loads((tmp_path / f"{part}.json").read_text())["rows"]
    assert "Not finished" not in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_two_processes_of_torchrun_share_each_run(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "normprop", "reproduce", "fig4", "--scale", "smoke", "--out", str(tmp_path)]
    run = subprocess.run(
        command, check=True, timeout=600, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert "can't share batches among 2 processes" in run.stdout
    done = {found.recipe for found in records.read(tmp_path / RUNS)}
    assert done == {wanted for wanted in every("fig4", SMOKE, 1) if wanted.batch_size > 1}
