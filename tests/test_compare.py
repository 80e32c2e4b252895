"""A grid of runs: what it holds, what a kill leaves of it, and what its table says."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock

from normprop.errors import NormPropError
from normprop.lab import claim
from normprop.lab.commands import main
from normprop.lab.comparison import records, workers
from normprop.lab.comparison.comparison import cells, choices, columns, points, promoted, remaining_seconds, to_dict
from normprop.lab.comparison.grid import Grid, check_comparable
from normprop.lab.comparison.records import RUNS, Record
from normprop.lab.comparison.workers import work, work_together
from normprop.lab.figures.comparison_figure import plot_batch_sizes, plot_curves, plot_rates
from normprop.lab.networks.normalizers import NORMALIZERS
from normprop.lab.samples.datasets import load
from normprop.lab.training.history import Row
from normprop.lab.training.loop import train
from normprop.lab.training.observer import Watcher
from normprop.lab.training.recipe import Recipe, clip_at, rate_at

TINY = Grid(
    model="mlp", width=0.1, norms=("batch", "none"), batch_sizes=(16,), rates=(0.05, 0.2), clips=(0.0,),
    epochs=1, train_images=64, validation=40,
)  # fmt: skip
COMMAND = (
    "compare --model mlp --width 0.1 --norms batch normprop --batch-sizes 16 --rates 0.05 0.2 --clips 0 0.05 "
    "--epochs 2 --train-images 64 --validation 40 --jobs 1 --out grid"
).split()


@pytest.fixture(scope="module")
def digits():
    images = load("digits")
    return dataclasses.replace(images, x_test=images.x_test[:40], y_test=images.y_test[:40])


@pytest.fixture
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def record(norm="batch", *, rate=0.1, clip=0.0, size=64, seed=0, validation=0.5, test=0.5, seconds=8.0):
    """A run as if it had been done; no accuracy for one that diverged."""
    recipe = Recipe(
        norm=norm, batch_size=size, lr=rate_at(size, rate), clip=clip_at(size, clip), seed=seed, epochs=2, validation=100
    )
    first = Row(1, 10, 0.1, 2.0, 0.3, None, 3.0, 100.0, validation_accuracy=0.2)
    diverged = validation is None
    last = Row(2, 20, 0.1, None if diverged else 1.0, 0.4, None if diverged else test, 5.0, 100.0, diverged, validation)
    return Record(recipe.resolved(), (first, last), 10, seconds, {"torch": "0"})


def chosen(*found):
    return choices(points(found))


# What a grid holds.


def test_every_combination_once_and_whole_seeds_first():
    grid = dataclasses.replace(TINY, norms=("batch", "none", "batch"), batch_sizes=(16, 4), clips=(0.0, 0.1), seeds=3)
    recipes = grid.recipes()
    assert len(recipes) == len(set(recipes)) == 2 * 2 * 2 * 2 * 3
    assert [recipe.seed for recipe in recipes] == sorted(recipe.seed for recipe in recipes)
    for norm in ("batch", "none"):
        mine = [recipe for recipe in recipes if recipe.norm == norm]
        assert {(r.batch_size, r.lr) for r in mine} == {(b, rate_at(b, rate)) for b in (16, 4) for rate in (0.05, 0.2)}
        assert {(r.batch_size, r.clip) for r in mine} == {(b, clip_at(b, clip)) for b in (16, 4) for clip in (0.0, 0.1)}


def test_finalists_alone_get_more_seeds():
    grid = dataclasses.replace(TINY, seeds=3, finalists=1)
    first, whole = grid.rounds()
    assert {recipe.seed for recipe in first.recipes()} == {0}
    done = [
        Record(recipe, (Row(1, 1, 0.1, 1.0, 0.5, 0.5, 1.0, 1.0, validation_accuracy=good),), 10, 1.0, {})
        for recipe, good in zip(first.recipes(), (0.3, 0.6, 0.4, 0.2), strict=True)
    ]
    wanted = promoted(whole.recipes(), done, 1)
    more = {(recipe.norm, recipe.lr, recipe.seed) for recipe in wanted if recipe.seed}
    assert more == {
        ("batch", rate_at(16, 0.2), 1),
        ("batch", rate_at(16, 0.2), 2),
        *(("none", done[1].recipe.lr, s) for s in (1, 2)),
    }
    assert [recipe for recipe in wanted if not recipe.seed] == first.recipes()
    few = promoted(whole.recipes(), done, 1, 1)
    assert [(recipe.norm, recipe.seed) for recipe in few if recipe.seed] == [(done[1].recipe.norm, s) for s in (1, 2)]
    assert dataclasses.replace(grid, finalists=None).rounds() == [dataclasses.replace(grid, finalists=None)]


def test_a_point_with_one_lucky_seed_is_not_chosen_over_one_with_more():
    lucky = record(rate=0.3, validation=0.9)
    tried = [record(rate=0.1, seed=seed, validation=0.5) for seed in range(3)]
    (choice,) = chosen(lucky, *tried)
    assert choice.best.rate == 0.1


def test_batch_statistics_are_left_out_at_batch_size_1():
    grid = dataclasses.replace(TINY, batch_sizes=(1, 2))
    assert {(r.norm, r.batch_size) for r in grid.recipes()} == {("batch", 2), ("none", 1), ("none", 2)}
    assert grid.left_out() == [("batch", 1)]
    assert [norm for norm in NORMALIZERS if NORMALIZERS[norm].smallest_batch > 1] == ["batch"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": ()}, "--rates names nothing"),
        ({"contenders": 2}, "--contenders 2 goes with --finalists"),
        ({"contenders": 0, "finalists": 1}, "--contenders 0 goes with --finalists"),
        ({"batch_sizes": ()}, "--batch-sizes names nothing"),
        ({"norms": ("bach",)}, "Did you mean batch"),
        ({"seeds": 0}, "below 1"),
        ({"epochs": 0}, "below 1"),
        ({"clips": (-0.1,)}, "below 0"),
        ({"rates": (0.0,)}, "--lr is 0"),
    ],
)
def test_grids_that_cannot_be_run_are_named(change, message):
    with pytest.raises(NormPropError, match=message):
        dataclasses.replace(TINY, **change).recipes()


def test_a_tenth_is_held_out_and_never_nothing(digits):
    assert dataclasses.replace(TINY, validation=None).fitted(digits).validation == 144
    with pytest.raises(NormPropError, match="--validation"):
        dataclasses.replace(TINY, validation=0).fitted(digits)


def test_only_one_setting_is_compared():
    recipes = TINY.recipes()
    check_comparable([*recipes, *dataclasses.replace(TINY, norms=("group",), rates=(1.0,), seeds=2).recipes()])
    with pytest.raises(NormPropError, match=r"--epochs 1 and 2 can't be compared"):
        check_comparable([*recipes, *dataclasses.replace(TINY, epochs=2).recipes()])


# What the file of runs survives.


def test_runs_come_back_as_they_were_written(tmp_path):
    written = [record(rate=1 / 3, size=48), record(validation=None), record("normprop", clip=0.05, size=1)]
    for run in written:
        records.append(tmp_path / "deep" / RUNS, run)
    assert records.read(tmp_path / "deep" / RUNS) == written
    assert records.read(tmp_path / "nothing" / RUNS) == []


@pytest.mark.parametrize("kept", [1, 20, 200, -1])
def test_a_line_that_was_cut_is_dropped_and_the_rest_stays(kept, tmp_path):
    file, runs = tmp_path / RUNS, [record(seed=seed) for seed in range(3)]
    for run in runs[:2]:
        records.append(file, run)
    whole = file.read_bytes()
    file.write_bytes(whole + runs[2].to_line()[:kept])
    assert records.read(file) == runs[:2]
    records.append(file, runs[2])  # a process that didn't look
    assert records.read(file) == runs
    file.write_bytes(whole + runs[2].to_line()[:kept])
    assert records.drop_fragment(file)
    assert file.read_bytes() == whole
    assert not records.drop_fragment(file)


def test_a_run_done_twice_counts_once(tmp_path):
    for test in (0.5, 0.6):
        records.append(tmp_path / RUNS, record(test=test))
    assert [run.test_accuracy for run in records.read(tmp_path / RUNS)] == [0.5]


@pytest.mark.parametrize("line", [b"{}", b"nonsense", b"[1]", b'{"recipe": {"optimizer": "adam"}, "rows": []}'])
def test_foreign_lines_are_named(line, tmp_path):
    (tmp_path / RUNS).write_bytes(record().to_line() + line + b"\n")
    with pytest.raises(NormPropError, match="line 2 is no run"):
        records.read(tmp_path / RUNS)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / RUNS).mkdir()
    with pytest.raises(NormPropError, match="couldn't be written"):
        records.append(tmp_path / RUNS, record())


# What is done, and by whom.


@pytest.fixture
def trained(monkeypatch):
    """The recipes that are trained from here on."""
    seen = []

    def counted(recipe, **options):
        seen.append(recipe)
        return train(recipe, **options)

    monkeypatch.setattr(workers, "train", counted)
    return seen


def timeless(found):
    return {
        run.recipe: [dataclasses.replace(row, seconds=0, images_per_second=0) for row in run.rows] for run in found
    }  # fmt: skip


def test_the_command_runs_finalists_in_a_second_round(in_a_new_folder, tmp_path):
    assert main([*COMMAND, "--seeds", "2", "--finalists", "1"]) == 0
    found = records.read(tmp_path / "grid" / RUNS)
    assert sorted(record.recipe.seed for record in found) == [0] * 8 + [1] * 2
    assert {(r.recipe.norm) for r in found if r.recipe.seed == 1} == {"batch", "normprop"}


def test_a_killed_grid_continues_with_what_is_missing(tmp_path, digits, trained):
    recipes = TINY.recipes()
    work(recipes, tmp_path, images=digits)
    assert trained == recipes
    whole = records.read(tmp_path / RUNS)
    file = tmp_path / RUNS
    file.write_bytes(file.read_bytes()[:-30])
    trained.clear()
    work(recipes, tmp_path, images=digits)
    assert trained == recipes[-1:]
    assert timeless(records.read(file)) == timeless(whole)
    work([*recipes, *dataclasses.replace(TINY, seeds=2).recipes()], tmp_path, images=digits)
    assert trained == [recipes[-1], *(dataclasses.replace(recipe, seed=1) for recipe in recipes)]


def test_what_another_process_is_doing_is_left_to_it(tmp_path, digits, trained, monkeypatch):
    recipes = TINY.recipes()
    places = []
    monkeypatch.setattr(claim, "FileLock", lambda path: places.append(path) or FileLock(path))
    work(recipes[:1], tmp_path, images=digits)
    (tmp_path / RUNS).unlink()
    trained.clear()
    with FileLock(places[0], is_singleton=False):
        work(recipes, tmp_path, images=digits)
        assert trained == recipes[1:]
    work(recipes, tmp_path, images=digits)
    assert trained == [*recipes[1:], recipes[0]]


def test_two_processes_share_a_grid(tmp_path):
    recipes, calls = TINY.recipes(), []
    work_together(recipes, tmp_path, jobs=2, finished=lambda: calls.append(len(records.read(tmp_path / RUNS))))
    assert calls[-1] == len(recipes) == len((tmp_path / RUNS).read_bytes().splitlines())
    assert {run.recipe for run in records.read(tmp_path / RUNS)} == set(recipes)


def test_what_goes_wrong_in_another_process_is_said_here(tmp_path):
    missing = dataclasses.replace(TINY, data=str(tmp_path / "none.npz")).recipes()
    with pytest.raises(NormPropError, match="There is no file"):
        work_together(missing, tmp_path, jobs=1, finished=lambda: None)


@dataclasses.dataclass(frozen=True)
class Kill:
    """Kills the process that is to do a run."""

    recipe: Recipe

    def __call__(self, recipe, images):
        if recipe == self.recipe:
            os.kill(os.getpid(), signal.SIGKILL)
        return Watcher()


def test_a_killed_process_is_said_and_loses_no_run(tmp_path, trained):
    recipes = TINY.recipes()
    with pytest.raises(NormPropError, match=r"was killed.*\n.*Repeat the command"):
        work_together(recipes, tmp_path, jobs=1, watch=Kill(recipes[2]), finished=lambda: None)
    assert not multiprocessing.active_children()
    assert [run.recipe for run in records.read(tmp_path / RUNS)] == recipes[:2]
    work(recipes, tmp_path, images=load("digits"))
    assert trained == recipes[2:]


@dataclasses.dataclass(frozen=True)
class Wait:
    """Notes that a run has begun, and holds it up."""

    folder: Path

    def __call__(self, recipe, images):
        (self.folder / f"begun-{os.getpid()}").touch()
        time.sleep(600)
        return Watcher()


def begun(folder, count):
    """Waits until so many runs have begun."""
    end = time.monotonic() + 60
    while len(list(folder.glob("begun-*"))) < count:
        assert time.monotonic() < end
        time.sleep(0.05)


def start_waiting(folder):
    work_together(TINY.recipes(), folder, jobs=2, watch=Wait(folder), finished=lambda: None)


def free_claims(folder):
    """Waits until nobody holds a claim: a lock ends with its process."""
    for path in (folder / ".claims").iterdir():
        with FileLock(path, timeout=30, is_singleton=False):
            pass


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    parent = multiprocessing.get_context("spawn").Process(target=start_waiting, args=(tmp_path,))
    parent.start()
    begun(tmp_path, 2)
    parent.kill()
    parent.join()
    free_claims(tmp_path)


def test_interruption_stops_runs_at_once(tmp_path):
    def interrupt():
        if len(list(tmp_path.glob("begun-*"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work_together(TINY.recipes(), tmp_path, jobs=2, watch=Wait(tmp_path), finished=interrupt)
    assert not multiprocessing.active_children()
    free_claims(tmp_path)


# What the table says.


def test_the_rate_is_chosen_on_validation_images_and_the_test_set_reported():
    runs = [record(rate=rate, validation=v, test=t) for rate, v, t in ((0.1, 0.6, 0.3), (0.3, 0.5, 0.9), (1.0, 0.2, 0.8))]
    (choice,) = chosen(*runs)
    assert (choice.best.rate, choice.best.test, choice.best.spread) == (0.1, 0.3, None)
    assert choice.at_edge
    assert choice.trains == (0.1, 0.3), "from 80 % of 0.6 on"


def test_means_and_spreads_are_over_seeds():
    runs = [record(rate=0.1, seed=s, validation=0.5, test=t) for s, t in enumerate((0.5, 0.6, 0.7))]
    runs += [record(rate=0.3, seed=s, validation=v) for s, v in enumerate((0.9, 0.1, 0.1))]
    (choice,) = chosen(*runs)
    assert choice.best.rate == 0.1
    assert choice.best.test == pytest.approx(0.6)
    assert choice.best.spread == pytest.approx(0.1)
    assert "60.0 ± 10.0" in cells(choice, [0.0])


def test_a_run_that_diverged_is_a_guess():
    (choice,) = chosen(record(seed=0, validation=0.5, test=0.5), record(seed=1, validation=None))
    assert choice.best.test == pytest.approx((0.5 + 0.1) / 2)
    assert choice.best.validation == pytest.approx((0.5 + 0.1) / 2)
    assert (choice.diverged, choice.runs) == (1, 2)
    assert "1 of 2" in cells(choice, [0.0])


def test_clipping_is_chosen_too_and_each_has_its_own_rate():
    accuracies = {(0.1, 0.0): 0.6, (0.3, 0.0): 0.4, (0.1, 0.05): 0.5, (0.3, 0.05): 0.7}
    runs = [record(rate=rate, clip=clip, validation=a, test=a) for (rate, clip), a in accuracies.items()]
    (choice,) = chosen(*runs)
    assert (choice.best.rate, choice.best.clip, choice.rates) == (0.3, 0.05, 2)
    assert [(point.clip, point.rate) for point in choice.by_clip] == [(0.0, 0.1), (0.05, 0.3)]
    assert dict(zip(columns([0.0, 0.05]), cells(choice, [0.0, 0.05]), strict=True)) == {
        "batch": "64", "normaliser": "batch", "test, %": "70.0", "rate": "0.3 (edge)", "clip": "0.05",
        "no clip, %": "60.0", "clip 0.05, %": "70.0", "rates that train": "0.3", "diverged": "0 of 4", "seeds": "1",
        "CPU s": "8",
    }  # fmt: skip


def test_batch_sizes_are_judged_by_themselves_at_rates_brought_to_64():
    runs = [record(norm, size=size, rate=0.3, clip=0.05, validation=v) for norm, size, v in
            (("none", 1, 0.3), ("batch", 64, 0.9), ("none", 64, 0.6))]  # fmt: skip
    found = chosen(*runs)
    assert [(c.best.batch_size, c.best.norm, c.best.rate, c.best.clip) for c in found] == [
        (1, "none", 0.3, 0.05), (64, "batch", 0.3, 0.05), (64, "none", 0.3, 0.05),
    ]  # fmt: skip
    assert [c.trains for c in found] == [(0.3,), (0.3,), ()]
    assert not any(c.at_edge for c in found), "one rate has no edge"


def test_ties_go_to_the_lower_rate_and_to_no_clipping():
    (choice,) = chosen(*(record(rate=rate, clip=clip) for rate in (0.3, 0.1) for clip in (0.05, 0.0)))
    assert (choice.best.rate, choice.best.clip) == (0.1, 0.0)


def test_a_choice_is_plain_numbers():
    plain = json.loads(json.dumps(to_dict(*chosen(record(), record(seed=1, validation=None))), allow_nan=False))
    assert plain["best"]["test_accuracy"] == [0.5, 0.1]
    assert plain["best"]["lr"] == pytest.approx(0.1)


def test_remaining_time_goes_by_runs_of_the_same_kind():
    done = [record("batch", seconds=10.0), record("none", seconds=20.0), record("none", rate=0.3, seconds=40.0)]
    missing = [record("none", seed=1).recipe, record("group").recipe]
    assert remaining_seconds(missing, done) == pytest.approx(30 + 70 / 3)
    assert remaining_seconds(missing, []) is None


def test_figures_show_every_run_where_it_belongs():
    runs = [
        record(norm, rate=rate, clip=clip, size=size, seed=seed, validation=rate / size, test=rate)
        for norm in ("batch", "none")
        for rate in (0.1, 0.3)
        for clip in (0.0, 0.05)
        for size in (16, 4)
        for seed in (0, 1)
    ]
    found = points(runs)
    rates = plot_rates(found, "title").axes
    assert [axes.get_title() for axes in rates] == [
        f"batch size {size}, {clip}" for size in (4, 16) for clip in ("no clipping", "clipping 0.05")
    ]
    for axes, size in zip(rates, (4, 4, 16, 16), strict=True):
        assert [line.get_label() for line in axes.lines] == ["batch", "none"]
        for line in axes.lines:
            assert line.get_xdata().tolist() == [0.1, 0.3]
            assert line.get_ydata().tolist() == pytest.approx([10 / size, 30 / size])
    curves = plot_curves(choices(found), "title").axes
    assert [line.get_ydata().tolist() for line in curves[1].lines] == [pytest.approx([20, 30 / 16])] * 2
    (sizes,) = plot_batch_sizes(choices(found), "title").axes
    for container in sizes.containers:
        assert container.lines[0].get_xdata().tolist() == [4, 16]
        assert container.lines[0].get_ydata().tolist() == pytest.approx([30, 30])
    assert [container.get_label() for container in sizes.containers] == ["batch", "none"]


# The command.


def test_the_command_from_start_to_summary(in_a_new_folder, tmp_path, trained, capsys):
    assert main(COMMAND) == 0
    out = capsys.readouterr().out
    assert "8/8" in out
    assert "\x1b" not in out
    folder = tmp_path / "grid"
    for figure in ("curves.png", "rate.png", "batch_size.png"):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    page, table = (folder / "index.html").read_text(), (folder / "table.md").read_text()
    report = json.loads((folder / "table.json").read_text())
    assert page.count("data:image/png;base64,") == 3
    assert [choice["norm"] for choice in report["choices"]] == ["normprop", "batch"]
    for choice in report["choices"]:
        mean = f"{100 * choice['best']['mean_test_accuracy']:.1f}"
        assert re.search(rf"\| {choice['norm']} +\| +{mean} \|", table)
        assert f'<td class="right">{mean}</td>' in page
    assert not (folder / ".claims").exists()
    trained.clear()
    assert main([*COMMAND, "--seeds", "2"]) == 0
    assert {recipe.seed for recipe in trained} == {1}
    assert "±" in (folder / "table.md").read_text()
    trained.clear()
    with (folder / RUNS).open("ab") as file:
        file.write(b'{"recipe": {"data"')
    capsys.readouterr()
    assert main(["compare", "--out", "grid", "--summary-only"]) == 0
    assert "in the middle of a line" in capsys.readouterr().out
    assert not trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--norms", "frn"), "needs images"),
        (("--batch-sizes", "65"), "more than the 64"),
        (("--jobs", "0"), "--jobs is 0"),
        (("--validation", "1436"), "can't be held out"),
        (("--summary-only",), "no finished runs"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(options, message, in_a_new_folder, trained, capsys):
    assert main([*COMMAND, *options]) == 2
    assert message in capsys.readouterr().err
    assert not trained


def test_another_setting_in_the_same_folder_is_refused(in_a_new_folder, tmp_path, trained, capsys):
    records.append(tmp_path / "grid" / RUNS, record())
    assert main(COMMAND) == 2
    assert "Use another --out" in capsys.readouterr().err
    assert not trained


def test_interruption_keeps_what_is_done(in_a_new_folder, tmp_path, monkeypatch, capsys):
    def third(recipe, **options):
        if len(records.read(tmp_path / "grid" / RUNS)) == 2:
            raise KeyboardInterrupt
        return train(recipe, **options)

    monkeypatch.setattr(workers, "train", third)
    assert main(COMMAND) == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert len(records.read(tmp_path / "grid" / RUNS)) == 2


@pytest.mark.parametrize("norm", NORMALIZERS)
@pytest.mark.parametrize("model", ["nin", "mlp", "plain12", "resnet8"])
def test_every_normaliser_trains_every_network_at_its_smallest_batch(model, norm, digits):
    size = NORMALIZERS[norm].smallest_batch
    recipe = Recipe(model=model, width=0.15, norm=norm, batch_size=size, lr=1e-3, epochs=1, train_images=2, validation=5)
    if model == "mlp" and NORMALIZERS[norm].images_only:
        with pytest.raises(NormPropError, match="needs images"):
            train(recipe, images=digits)
        return
    if size == 2:
        recipe = dataclasses.replace(recipe, train_images=4)
    run = train(recipe, images=digits)
    assert run.rows[-1].step == 2
    assert math.isfinite(run.rows[-1].train_loss)
