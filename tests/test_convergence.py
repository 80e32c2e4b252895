"""Runs to the end: killed queues end as whole ones do, and half-done ones are reported as such."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

import normprop
from normprop.errors import NormPropError
from normprop.lab.commands import main
from normprop.lab.convergence import cell_file, choice
from normprop.lab.convergence.outcome_table import account, outcome_table
from normprop.lab.convergence.plan import NORMS, PLANS, plan
from normprop.lab.convergence.pulse import drift, gains
from normprop.lab.convergence.queue import Folders, continue_queue
from normprop.lab.convergence.state_table import state_table, states
from normprop.lab.figures.convergence_figure import plot_convergence
from normprop.lab.networks.mobilenet import mobilenet
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer
from normprop.lab.samples.datasets import load
from normprop.lab.training import checkpoint
from normprop.lab.training.loop import CHECKPOINT, train
from normprop.lab.training.observer import Observer
from normprop.lab.training.recipe import Recipe

CELLS = PLANS["smoke"].cells(["digits-16"])[:2]
# Of a row, what the clock says.
TIMES = ("seconds", "images_per_second")


class Killed(BaseException):
    """Stands for a signal: nothing in the package may catch it."""


class KillAfter(Observer):
    """Kills after so many epochs or steps, over all runs that it is told of."""

    def __init__(self, *, epochs=math.inf, steps=math.inf):
        self.epochs, self.steps = epochs, steps

    def ended_epoch(self, row, epochs):
        self.epochs -= 1
        if not self.epochs:
            raise Killed

    def stepped(self, epoch, step, steps, loss):
        self.steps -= 1
        if not self.steps:
            raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A queue that nobody interrupted."""
    folders = Folders(tmp_path_factory.mktemp("whole"))
    continue_queue(CELLS, folders, load)
    return folders


def timeless(folders, cell):
    """A cell's file without times."""
    found = json.loads((folders.cells / f"{cell.name}.json").read_text())
    for row in found["rows"]:
        for name in TIMES:
            del row[name]
    return found


@pytest.mark.parametrize(
    "kills", [{"epochs": 1}, {"epochs": 2}, {"epochs": 5}, {"steps": 1}, {"steps": 20}], ids=lambda k: str(k)[1:-1]
)
def test_a_killed_queue_goes_on_to_the_same_numbers(kills, whole, tmp_path):
    folders = Folders(tmp_path)
    with pytest.raises(Killed):
        continue_queue(CELLS, folders, load, observer=KillAfter(**kills))
    torch.rand(3)  # a new process has another random state
    continue_queue(CELLS, folders, load)
    for cell in CELLS:
        assert timeless(folders, cell) == timeless(whole, cell)
    assert not [*folders.root.glob("state/*")], "what resuming needs is gone when nothing has to be resumed"


def test_a_queue_killed_at_every_epoch_comes_to_its_end(whole, tmp_path):
    folders, sessions = Folders(tmp_path), 0
    while not all(state.finished for state in states(CELLS, folders)):
        sessions += 1
        with pytest.raises(Killed):
            continue_queue(CELLS, folders, load, observer=KillAfter(epochs=2))
    assert sessions > 3
    for cell in CELLS:
        assert timeless(folders, cell) == timeless(whole, cell)


def test_a_kept_network_resumes_to_the_same_weights(tmp_path):
    """The rows are those of the whole run, and so is every bit of the network."""
    images = load("digits")
    recipe = dataclasses.replace(CELLS[1].group.recipe("normprop", 3, 0.1, 0.05), epochs=4, flips=True, crops=1)
    straight = train(recipe, images=images)
    with pytest.raises(Killed):
        train(recipe, images=images, out=tmp_path, checkpoint_every=7, observer=KillAfter(steps=24))
    assert checkpoint.load(tmp_path / CHECKPOINT)["calibration"]["measured"] == [0, 16]
    resumed = train(recipe, images=images, out=tmp_path, resume=True)
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_keeping_calibrated_is_what_a_loop_of_ones_own_does():
    """The same as `keep_calibrated` without the training loop's own calibration; the network is measured as it says."""
    images = load("digits")
    base = Recipe(model="resnet8", width=0.25, epochs=1, train_images=320, batch_size=16, lr=0.05, seed=2)
    kept = dataclasses.replace(base, keep_calibrated=True).resolved()
    assert kept == kept.resolved()
    assert (kept.calibrate, kept.recalibrate, kept.beta) == (0, None, None)
    run = train(kept, images=images)
    once = train(dataclasses.replace(base, calibrate=0, beta=0.0), images=images)
    x = images.x_train[:200]
    standardized = run.model[0].eval()(x)
    assert drift(run.model[1], standardized)["rms"] < 0.7 * drift(once.model[1], standardized)["rms"]
    for wrong in ({"norm": "batch"}, {"calibrate": 16}, {"beta": 0.5}):
        with pytest.raises(NormPropError, match="keep-calibrated"):
            dataclasses.replace(base, keep_calibrated=True, **wrong).resolved()


def test_both_normalisers_choose_from_the_same(whole):
    for group in PLANS["full"].groups:
        offers = {norm: {(r.lr, r.clip) for r in group.candidates(norm)} for norm in NORMS}
        assert offers["batch"] == offers["normprop"]
        assert {clip for _, clip in offers["batch"]} > {0.0}
        finals = [group.recipe(norm, 1, 0.1, 0.0) for norm in NORMS]
        differing = {f for f in vars(finals[0]) if len({getattr(r, f) for r in finals}) > 1}
        assert differing == {"norm", "keep_calibrated", "beta"}
        assert not any(r.validation for r in finals), "all training images"
        assert all(r.validation for norm in NORMS for r in group.candidates(norm))
    for cell in CELLS:
        file = cell_file.read(whole.cells, cell.name)
        best = max(run["validation_accuracy"] or 0 for run in file.choice)
        close = [run for run in file.choice if (run["validation_accuracy"] or 0) >= best - 0.005]
        assert file.recipe.lr == min(run["lr"] for run in close)
        assert file.recipe.clip in [run["clip"] for run in close if run["lr"] == file.recipe.lr]
        assert len(file.choice) == 4


def test_processors_without_bfloat16_train_in_float32(monkeypatch):
    whole = plan("full")
    assert whole.on(torch.device("cuda")) is whole
    for has, dtype in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr("normprop.lab.convergence.plan.computes_bfloat16", lambda _, has=has: has)
        assert {cell.group.base.dtype for cell in whole.on(torch.device("cpu")).cells()} == {dtype}


def test_the_first_pair_comes_first_and_every_cell_once():
    names = [cell.name for cell in plan("full").cells()]
    assert names[:2] == ["resnet8-128-batch-s0", "resnet8-128-normprop-s0"]
    assert len(set(names)) == len(names) == sum(2 * len(group.seeds) for group in PLANS["full"].groups)
    assert [cell.name for cell in plan("full").cells(["nin"])] == [name for name in names if name.startswith("nin-")]
    with pytest.raises(NormPropError, match="resnet20-128"):
        plan("full").cells(["resnet20-129"])


def test_states_of_a_half_done_queue(whole, tmp_path):
    folders = Folders(tmp_path)
    cells = PLANS["smoke"].cells(["digits-16"])
    fresh = states(cells, folders)
    assert [state.words() for state in fresh] == ["not begun"] * 4
    expected = len(cells) * 3 + 2 * 4 * 96 / 240  # seconds: an epoch each, and two choices of four short runs
    assert sum(state.left for state in fresh) == pytest.approx(expected)
    with pytest.raises(Killed):
        continue_queue(cells, folders, load, observer=KillAfter(epochs=4))
    found = states(cells, folders)
    assert [state.words() for state in found] == ["finished", "epoch 1 of 3", "not begun", "not begun"]
    assert found[0].left == 0
    first, second = (cell_file.read(folders.cells, cell.name) for cell in cells[:2])
    assert found[1].left == pytest.approx(2 * second.rows[0]["seconds"])
    assert found[2].left == pytest.approx(3 * sorted(row["seconds"] for row in first.rows)[1])
    assert "1 of 4 cells are finished" in state_table(found).note

    table = outcome_table(found)
    assert [row[1:2] + row[7:9] for row in table.rows] == [("BatchNorm", "1", "3"), ("NormProp", "1", "1 of 3")]
    assert account(found).splitlines()[-1] == (
        "| digits, batches of 16, 3 epochs | BatchNorm 0 | NormProp 0 (epoch 1 of 3) | BatchNorm 1, NormProp 1 |"
    )
    axes = plot_convergence(found, "t").axes
    assert [len(one.lines) for one in axes] == [2, 2, 1, 2], "BatchNorm has no drift"
    assert [len(line.get_xdata()) for line in axes[0].lines] == [3, 1]


def test_a_diverged_cell_is_a_guess_and_is_not_trained_again(tmp_path, monkeypatch):
    folders, cell = Folders(tmp_path), CELLS[0]
    hopeless = cell.group.recipe("batch", 0, 1e30, 0.0)
    monkeypatch.setattr(choice, "chosen", lambda *_: dataclasses.replace(hopeless, schedule="constant"))
    continue_queue([cell], folders, load)
    file = cell_file.read(folders.cells, cell.name)
    assert file.diverged
    assert file.finished
    assert "(1 diverged)" in outcome_table(states([cell], folders)).rows[0][2]
    before = (folders.cells / f"{cell.name}.json").read_bytes()
    continue_queue([cell], folders, load)
    assert (folders.cells / f"{cell.name}.json").read_bytes() == before


def test_what_was_lost_or_damaged_is_said(tmp_path):
    folders, cell = Folders(tmp_path), CELLS[0]
    with pytest.raises(Killed):
        continue_queue([cell], folders, load, observer=KillAfter(epochs=3))
    file = cell_file.read(folders.cells, cell.name)
    dataclasses.replace(file, rows=file.rows[:2]).write(folders.cells)
    (folders.state(cell) / CHECKPOINT).unlink()
    with pytest.raises(NormPropError, match=r"2 epochs and no checkpoint"):
        continue_queue([cell], folders, load)
    path = folders.cells / f"{cell.name}.json"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(NormPropError, match="no cell of this version"):
        states([cell], folders)


def test_another_seed_needs_no_short_runs(whole, tmp_path):
    """The files of cells suffice, without the folders in which the first seed chose its rate."""
    folders, cell = Folders(tmp_path), dataclasses.replace(CELLS[1], seed=1)
    shutil.copytree(whole.cells, folders.cells)
    continue_queue([cell], folders, load)
    first, second = (cell_file.read(folders.cells, one.name) for one in (CELLS[1], cell))
    assert second.finished
    assert second.choice == first.choice
    assert dataclasses.replace(second.recipe, seed=first.recipe.seed) == first.recipe
    assert not folders.choice(cell).exists()


def test_the_command_lists_trains_and_reports(whole, tmp_path, capsys):
    out = ["--scale", "smoke", "--only", "digits-16", "--out", str(whole.root)]
    before = {path: path.read_bytes() for path in whole.cells.iterdir()}
    assert main(["reproduce", "long", *out, "--list"]) == 0
    assert "2 of 4 cells are finished" in capsys.readouterr().out
    assert main(["reproduce", "long", *out, "--report", "--results", str(tmp_path), "--page", str(tmp_path / "p.md")]) == 0
    assert {path: path.read_bytes() for path in whole.cells.iterdir()} == before
    page = (tmp_path / "p.md").read_text()
    assert "| NormProp" in page
    assert "BatchNorm 1, NormProp 1 |" in page
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "cells").iterdir()} == {path.name for path in before}
    assert main(["reproduce", "long", "--scale", "smoke", "--only", "digits-17"]) == 2
    assert "digits-16" in capsys.readouterr().err


def test_drift_and_gains_are_of_sites_and_batch_norms():
    network = build("resnet8", shape=(3, 16, 16), classes=4, norm=normalizer("batch"), width=0.25)
    assert drift(network, torch.randn(8, 3, 16, 16)) is None
    converted = normprop.convert(network)
    x = torch.randn(64, 3, 16, 16)
    near = drift(converted, x)
    assert 0 < near["rms"] <= near["worst"]
    assert drift(converted, 4 * x)["rms"] > near["rms"] + 1, "inputs two octaves off are, at least in the first layers"
    with torch.no_grad():
        network.norm.weight.fill_(-3.0)
    assert gains(network)["greatest"] == 3
    assert gains(torch.nn.Linear(2, 2)) is None


def test_the_small_mobilenet_has_what_it_is_there_for():
    network = mobilenet(channels=3, classes=10)
    kinds = {type(module).__name__ for module in network.modules()}
    assert {"SqueezeExcitation", "Hardswish", "BatchNorm2d"} <= kinds
    shapes = []
    network.features[-1].register_forward_hook(lambda _m, _i, y: shapes.append(y.shape[-2:]))
    network.eval()(torch.zeros(1, 3, 32, 32))
    assert shapes == [(4, 4)]
    converted = normprop.convert(network, example=torch.zeros(2, 3, 32, 32)).eval()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(converted(x)[1:2], converted(x[1:2]), rtol=1e-4, atol=1e-5)
