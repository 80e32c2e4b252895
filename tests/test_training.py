"""The training loop: exact resume, divergence, whole checkpoints, one batch order for any number of processes."""

import dataclasses
import errno
import json
import math
import os

import pytest
import torch

from normprop.conversion.calibration import calibrate
from normprop.errors import NormPropError
from normprop.lab.samples.batches import Batches
from normprop.lab.samples.datasets import load
from normprop.lab.samples.seeds import derived
from normprop.lab.training import checkpoint
from normprop.lab.training.loop import CHECKPOINT, METRICS, RECIPE, train
from normprop.lab.training.observer import Observer
from normprop.lab.training.optimizer import build_optimizer
from normprop.lab.training.preparation import build_model, prepared, some
from normprop.lab.training.processes import processes
from normprop.lab.training.recipe import Recipe
from normprop.lab.training.schedules import build_schedule
from normprop.sites.site import Site

TINY = Recipe(
    model="resnet8", width=0.25, norm="batch", batch_size=32, epochs=2, train_images=160, flips=True, crops=1, seed=3
)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


class Killed(BaseException):
    """Stands for a signal: nothing in the package may catch it."""


class KillAt(Observer):
    def __init__(self, epoch, step):
        self.place = (epoch, step)

    def stepped(self, epoch, step, steps, loss):
        if (epoch, step) == self.place:
            raise Killed


def weights(run):
    return run.model.state_dict()


def assert_same_run(a, b):
    for key, value in weights(a).items():
        assert torch.equal(value, weights(b)[key]), key
    timeless = [[dataclasses.replace(row, seconds=0, images_per_second=0) for row in run.rows] for run in (a, b)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("norm", ["batch", "normprop", "paper", "frozen"])
@pytest.mark.parametrize("kill", [(1, 1), (1, 4), (2, 1), (2, 3)], ids=lambda k: f"epoch{k[0]}step{k[1]}")
def test_a_killed_run_resumes_to_the_same_weights(norm, kill, digits, tmp_path):
    recipe = dataclasses.replace(TINY, norm=norm, recalibrate=64 if norm == "normprop" else None)
    whole = train(recipe, images=digits)
    with pytest.raises(Killed):
        train(recipe, images=digits, out=tmp_path, checkpoint_every=1, observer=KillAt(*kill))
    torch.rand(7)  # a new process has another random state
    if kill == (1, 1):  # killed before the first checkpoint was written
        with pytest.raises(NormPropError, match="no checkpoint"):
            train(recipe, images=digits, out=tmp_path, resume=True)
        return
    resumed = train(recipe, images=digits, out=tmp_path, resume=True, checkpoint_every=2)
    assert_same_run(whole, resumed)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


def test_dropout_resumes_too(digits, tmp_path, monkeypatch):
    (tmp_path / "dropping.py").write_text(
        "from torch import nn\n"
        "def net(channels, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * channels, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = dataclasses.replace(TINY, model="dropping:net", width=1.0, flips=False)
    whole = train(recipe, images=digits)
    with pytest.raises(Killed):
        train(recipe, images=digits, out=tmp_path / "run", checkpoint_every=1, observer=KillAt(1, 3))
    assert_same_run(whole, train(recipe, images=digits, out=tmp_path / "run", resume=True))


def test_a_finished_run_resumes_to_itself(digits, tmp_path):
    first = train(TINY, images=digits, out=tmp_path)
    assert_same_run(first, train(TINY, images=digits, out=tmp_path, resume=True))
    assert json.loads((tmp_path / RECIPE).read_text())["lr"] == first.recipe.lr


def test_more_epochs_under_an_open_ended_schedule(digits, tmp_path):
    short = dataclasses.replace(TINY, schedule="constant", epochs=1, halve_every=1)
    longer = dataclasses.replace(short, epochs=2)
    train(short, images=digits, out=tmp_path)
    assert_same_run(train(longer, images=digits), train(longer, images=digits, out=tmp_path, resume=True))


def test_resume_refuses_other_settings_and_a_new_run_refuses_to_overwrite(digits, tmp_path):
    train(TINY, images=digits, out=tmp_path)
    with pytest.raises(NormPropError, match=r"--epochs 2 → 4; --lr .* → 0.3"):
        train(dataclasses.replace(TINY, lr=0.3, epochs=4), images=digits, out=tmp_path, resume=True)
    with pytest.raises(NormPropError, match=r"--resume.*--overwrite"):
        train(TINY, images=digits, out=tmp_path)
    train(dataclasses.replace(TINY, epochs=0), images=digits, out=tmp_path, overwrite=True)
    assert not (tmp_path / CHECKPOINT).exists()
    with pytest.raises(NormPropError, match="no folder to resume"):
        train(TINY, images=digits, resume=True)


def test_equal_recipes_give_equal_weights_and_seeds_differ(digits):
    a, b = (train(TINY, images=digits) for _ in range(2))
    assert_same_run(a, b)
    other = train(dataclasses.replace(TINY, seed=4), images=digits)
    assert not torch.equal(weights(a)["network.fc.weight"], weights(other)["network.fc.weight"])


@pytest.mark.parametrize("norm", ["batch", "normprop", "group", "none"])
def test_training_learns(norm, digits):
    recipe = Recipe(model="resnet8", width=0.5, norm=norm, batch_size=16, epochs=2, train_images=800)
    run = train(recipe, images=digits)
    assert run.rows[-1].train_loss < run.rows[0].train_loss
    assert run.test_accuracy > 0.7
    assert run.rows[-1].step == 100


def test_the_checkpoint_knows_the_input(digits, tmp_path):
    run = train(TINY, images=digits, out=tmp_path)
    state = checkpoint.load(tmp_path / CHECKPOINT)["model"]
    assert torch.equal(state["standardize.mean"], run.model.standardize.mean)
    assert run.model.standardize.mean == digits.subset(160).x_train.double().mean().float()


def test_divergence_is_recorded_and_stops(digits, tmp_path):
    recipe = dataclasses.replace(TINY, norm="none", lr=1e6, schedule="constant", epochs=5)
    run = train(recipe, images=digits, out=tmp_path)
    assert run.diverged
    assert run.test_accuracy is None
    assert all(torch.isfinite(v).all() for v in weights(run).values() if v.is_floating_point()) or len(run.rows) < 5
    last = json.loads((tmp_path / METRICS).read_text().splitlines()[-1])
    assert last["diverged"]
    assert last["test_accuracy"] is None
    assert not (tmp_path / CHECKPOINT).exists() or checkpoint.load(tmp_path / CHECKPOINT)["epoch"] < 5


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fails", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_the_previous_checkpoint(fails, tmp_path, monkeypatch):
    path = tmp_path / CHECKPOINT
    checkpoint.save(path, {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(fails, full_disk)
        with pytest.raises(NormPropError, match=r"No space left on device(.|\n)*previous version is intact"):
            checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT], "no fragment stays"


def test_a_kill_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    def killed(*args):
        raise Killed

    path = tmp_path / CHECKPOINT
    checkpoint.save(path, {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(Killed):
            checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1
    checkpoint.save(path, {"epoch": 3})  # over the fragment
    assert checkpoint.load(path)["epoch"] == 3


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NormPropError, match="couldn't be written"):
        checkpoint.save(tmp_path / "file" / CHECKPOINT, {})


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_checkpoints_are_named(keep, tmp_path):
    path = tmp_path / CHECKPOINT
    checkpoint.save(path, {"model": {"w": torch.zeros(1000)}})
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(NormPropError, match="truncated"):
        checkpoint.load(path)


def same(a, b):
    """Whether two states hold the same."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_flipped_bit_is_noticed_or_changes_nothing(digits, tmp_path):
    train(TINY, images=digits, out=tmp_path)
    path = tmp_path / CHECKPOINT
    content, state = path.read_bytes(), checkpoint.load(path)
    refused = 0
    for place in range(0, 8 * len(content), 8 * len(content) // 199):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            assert same(checkpoint.load(path), state), place
        except NormPropError:
            refused += 1
    assert refused > 100  # the rest are gaps between the parts of a file


def tampered(state):
    """Changes of a state, each of which ends in an error somewhere if nobody looks."""
    for key in (key for key in state if key != "format"):  # which `save` writes
        for value in (None, "text", [], {}, -1.5, torch.zeros(3)):
            if type(value) is not type(state[key]):
                yield f"{key} {value}", {**state, key: value}
        yield f"no {key}", {k: v for k, v in state.items() if k != key}
    weight = next(iter(state["model"]))
    yield "shape", {**state, "model": {**state["model"], weight: torch.zeros(7)}}
    yield "key", {**state, "model": {**state["model"], "other": torch.zeros(7)}}
    momenta = {k: {"momentum_buffer": torch.zeros(7)} for k in state["optimizer"]["state"]}
    yield "momentum", {**state, "optimizer": {**state["optimizer"], "state": momenta}}
    yield "groups", {**state, "optimizer": {**state["optimizer"], "param_groups": [1]}}
    yield "schedule", {**state, "schedule": {**state["schedule"], "step": "text"}}
    yield "row", {**state, "rows": [{"epoch": 1}]}
    yield "recipe", {**state, "recipe": {**state["recipe"], "lr": "text"}}


def test_a_tampered_checkpoint_is_refused_in_one_line(digits, tmp_path):
    train(TINY, images=digits, out=tmp_path)
    state = checkpoint.load(tmp_path / CHECKPOINT)
    for name, changed in tampered(state):
        checkpoint.save(tmp_path / CHECKPOINT, changed)
        with pytest.raises(NormPropError) as error:  # noqa: PT012
            train(TINY, images=digits, out=tmp_path, resume=True)
            pytest.fail(f"{name} was taken")
        assert len(str(error.value).splitlines()) == 2, name


class Foreign:
    """What torch.load must not execute."""


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3), Foreign()], ids=type)
def test_foreign_checkpoints_are_named(content, tmp_path):
    torch.save(content, tmp_path / CHECKPOINT)
    with pytest.raises(NormPropError, match=r"wasn't written by|truncated, damaged or no checkpoint"):
        checkpoint.load(tmp_path / CHECKPOINT)


def test_a_checkpoint_of_another_network_is_named(digits, tmp_path):
    train(TINY, images=digits, out=tmp_path)
    state = checkpoint.load(tmp_path / CHECKPOINT)
    state["model"].pop("network.fc.bias")
    checkpoint.save(tmp_path / CHECKPOINT, state)
    with pytest.raises(NormPropError, match="doesn't fit the network"):
        train(TINY, images=digits, out=tmp_path, resume=True)


def reference_batch(x, order, mirror, shift, places, by):
    """Each image of a batch mirrored and shifted pixel by pixel; zeros move in."""
    images = x[order[places]].tolist()
    for image, flip, (down, right) in zip(images, mirror[places].tolist(), (shift[places] - by).tolist(), strict=True):
        for channel in image:
            rows = [row[::-1] if flip else row for row in channel]
            pixel = lambda r, c, rows=rows: rows[r][c] if 0 <= r < len(rows) and 0 <= c < len(rows[0]) else 0
            channel[:] = [[pixel(r + down, c + right) for c in range(len(rows[0]))] for r in range(len(rows))]
    return torch.tensor(images, dtype=x.dtype)


@pytest.mark.parametrize(("flips", "crops"), [(True, 0), (False, 2), (True, 2)])
def test_augmentation_is_drawn_by_seed_and_epoch_for_each_sample(flips, crops):
    """Numbers of earlier runs stay theirs: this is how the random numbers of an epoch are spent."""
    x = torch.randint(0, 256, (40, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(derived(7, 2))
    order = torch.randperm(40, generator=g)
    mirror = torch.rand(40, generator=g) < (0.5 if flips else 0.0)
    shift = torch.randint(0, 2 * crops + 1, (40, 2), generator=g)
    batches = Batches(x, torch.arange(40), batch_size=8, seed=7, epoch=2, flips=flips, crops=crops)
    torch.rand(3)  # the global generator has no say
    for step in (3, 0, 4):
        expected = reference_batch(x, order, mirror, shift, slice(8 * step, 8 * step + 8), crops)
        assert torch.equal(batches.batch(step)[0], expected)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_of_a_batch_make_up_the_batch(world, digits):
    batches = Batches(digits.x_train, digits.y_train, batch_size=8, seed=0, epoch=1, flips=True, crops=2)
    x, y = batches.batch(5)
    shares = [batches.batch(5, rank=rank, world=world) for rank in range(world)]
    assert torch.equal(torch.stack([s[0] for s in shares], 1).flatten(0, 1), x)
    assert torch.equal(torch.stack([s[1] for s in shares], 1).flatten(), y)


def test_an_epoch_sees_each_sample_once_in_a_new_order():
    x, y = torch.arange(12)[:, None], torch.arange(12)
    orders = []
    for epoch in range(2):
        batches = Batches(x, y, batch_size=4, seed=0, epoch=epoch)
        orders.append(torch.cat([batches.batch(i)[1] for i in range(len(batches))]))
    assert sorted(orders[0].tolist()) == list(range(12))
    assert not torch.equal(*orders)


def test_augmentation_moves_pixels_and_nothing_else():
    x = torch.arange(1, 65, dtype=torch.float32).reshape(1, 1, 8, 8).repeat(64, 1, 1, 1)
    plain = Batches(x, torch.zeros(64), batch_size=64, seed=0, epoch=0).batch(0)[0]
    assert torch.equal(plain, x)
    mirrored = Batches(x, torch.zeros(64), batch_size=64, seed=0, epoch=0, flips=True).batch(0)[0]
    same = (mirrored == x).all(dim=(1, 2, 3))
    assert 16 < same.sum() < 48
    assert torch.equal(mirrored[~same], x.flip(-1)[~same])
    shifted = Batches(x, torch.zeros(64), batch_size=64, seed=0, epoch=0, crops=1).batch(0)[0]
    windows = torch.nn.functional.pad(x[:1], (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1).reshape(9, 8, 8)
    found = (shifted.reshape(64, 1, 64) == windows.reshape(1, 9, 64)).all(-1)
    assert (found.sum(1) == 1).all()
    assert (found.sum(0) > 0).all(), "every shift occurs"


SCHEDULES = ("onecycle", "cosine", "halving", "constant")


def reference_factor(schedule, step, *, total_steps, halve_every):
    """What the highest rate is multiplied by at a step, written out: both ends of the curves lie half a step outside."""
    done = (step + 0.5) / total_steps
    if schedule == "onecycle":
        return 4 * done if done < 0.25 else 0.5 * (1 + math.cos(math.pi * (done - 0.25) / 0.75))
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 0.5 ** (step // halve_every) if schedule == "halving" else 1.0


def tiny_optimizer():
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(2)]
    return torch.optim.SGD(groups, lr=0.3)


def rates(optimizer, schedule, steps):
    """Of so many steps; both groups have the same."""
    found = []
    for _ in range(steps):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        found.append(rate)
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40, 1001])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_follow_their_formulas_and_every_step_moves(schedule, steps):
    optimizer = tiny_optimizer()
    found = rates(optimizer, build_schedule(optimizer, schedule, total_steps=steps, halve_every=3), steps)
    expected = [0.3 * reference_factor(schedule, s, total_steps=steps, halve_every=3) for s in range(steps)]
    assert found == pytest.approx(expected, rel=1e-12, abs=0)
    assert all(0 < rate <= 0.3 for rate in found)
    peak = found.index(max(found))
    assert found[peak:] == sorted(found[peak:], reverse=True)


@pytest.mark.parametrize("stop", [0, 1, 2, 9, 25, 39])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_resume_exactly(schedule, stop):
    settings = {"schedule": schedule, "total_steps": 40, "halve_every": 3}
    whole, part, resumed = (tiny_optimizer() for _ in range(3))
    moved = build_schedule(part, **settings)
    before = rates(part, moved, stop)
    after = build_schedule(resumed, **settings)
    resumed.load_state_dict(part.state_dict())
    after.load_state_dict(moved.state_dict())
    assert before + rates(resumed, after, 40 - stop) == rates(whole, build_schedule(whole, **settings), 40)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_of_a_run_are_those_of_its_schedule(schedule, digits):
    recipe = dataclasses.replace(TINY, schedule=schedule, epochs=3, lr=0.05)
    expected = [0.05 * reference_factor(schedule, s, total_steps=15, halve_every=5) for s in (4, 9, 14)]
    assert [row.lr for row in train(recipe, images=digits).rows] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1}, "--norm normprop, which works at any batch size"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"epochs": -1}, "--epochs is -1"),
        ({"lr": 0.0}, "--lr is 0"),
        ({"lr": math.nan}, "--lr is nan"),
        ({"norm": "normprop", "batch_size": 1, "data_norm": "batch"}, "--data-norm global"),
        ({"batch_size": 161}, "more than the 160"),
        ({"validation": -1}, "--validation is -1"),
        ({"data": "digit"}, "Did you mean digits"),
    ],
)
def test_recipes_that_cannot_be_followed_are_named(change, message):
    with pytest.raises(NormPropError, match=message):
        train(dataclasses.replace(TINY, **change))


def test_a_device_that_is_not_there_is_named(digits):
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(NormPropError, match="--device cpu"):
            train(TINY, images=digits, device=device)


def test_batch_data_normalisation_and_bf16_train(digits):
    run = train(dataclasses.replace(TINY, data_norm="batch", dtype="bf16"), images=digits)
    assert math.isfinite(run.rows[-1].train_loss)
    assert run.model.standardize.mode == "batch"


def test_normprop_is_calibrated_on_training_samples_before_the_first_step(digits):
    start = dataclasses.replace(TINY, norm="normprop", epochs=0, keep_calibrated=False)
    constants = lambda run: torch.cat([t for k, t in run.model.state_dict().items() if k.endswith(".scale")])
    assert start.resolved().calibrate == 256
    assert (constants(train(start, images=digits)) != 1).all()
    assert (constants(train(dataclasses.replace(start, calibrate=0), images=digits)) == 1).all()
    run = train(dataclasses.replace(start, calibrate=100), images=digits)
    sites = [m for m in run.model.network.modules() if isinstance(m, Site)]
    sample = run.model.standardize(some(prepared(digits, start), derived(start.seed, -1), 100))
    before = [t.clone() for site in sites for t in (site.shift, site.scale)]
    calibrate(run.model.network, sample, **run.recipe.covariance())
    for a, b in zip(before, [t for site in sites for t in (site.shift, site.scale)], strict=True):
        torch.testing.assert_close(a, b)


def test_directions_count_whole_where_nothing_is_clipped():
    recipe = dataclasses.replace(TINY, norm="normprop", keep_calibrated=False)
    shrinkage = lambda **changes: dataclasses.replace(recipe, **changes).resolved().shrinkage
    assert shrinkage(clip=0.0) == 0.0 < shrinkage() < 1.0
    assert shrinkage(clip=0.0, shrinkage=0.5) == 0.5
    assert shrinkage(norm="batch") is None
    for changes in ({"shrinkage": 1.5}, {"shrinkage": -0.5}, {"norm": "batch", "shrinkage": 0.5}):
        with pytest.raises(NormPropError, match="shrinkage"):
            shrinkage(**changes)


def test_beta_starts_where_the_recipe_says(digits):
    starts = lambda **changes: train(dataclasses.replace(TINY, epochs=0, **changes), images=digits).model
    gains = lambda model: [
        m for m in model.modules() if isinstance(getattr(m, "bias", None), torch.Tensor) and m.weight.dim() == 1
    ]
    values = lambda model: {b for module in gains(model) for b in module.bias.tolist()}
    for norm in ("normprop", "paper", "batch", "frozen", "group", "layer", "instance", "ws", "frn", "evonorm-s0"):
        assert values(starts(norm=norm)) == {0.0}, norm
        assert values(starts(norm=norm, beta=0.25)) == {0.25}, norm
    shifted = starts(norm="normprop", beta=0.25)
    before = [t.clone() for m in gains(shifted) for t in (m.shift, m.scale)]
    recipe = dataclasses.replace(TINY, norm="normprop", beta=0.25).resolved()
    sample = shifted.standardize(some(prepared(digits, recipe), derived(recipe.seed, -1), recipe.calibrate))
    calibrate(shifted.network, sample, **recipe.covariance())
    for a, b in zip(before, [t for m in gains(shifted) for t in (m.shift, m.scale)], strict=True):
        torch.testing.assert_close(a, b)
    for norm in ("none", "nf", "weight"):
        with pytest.raises(NormPropError, match="--beta"):
            starts(norm=norm, beta=0.25)
    with pytest.raises(NormPropError, match="--beta is nan"):
        starts(beta=math.nan)


def test_a_deep_calibrated_network_starts_above_0(digits):
    deep = dataclasses.replace(TINY, model="plain24", width=0.5, norm="normprop", epochs=0)
    values = lambda **changes: {
        b
        for m in train(dataclasses.replace(deep, **changes), images=digits).model.modules()
        if isinstance(m, Site)
        for b in m.bias.tolist()
    }
    assert values() <= {0.5, 1.0} >= values(keep_calibrated=False)
    assert values(beta=0.0) == values(calibrate=0) == {0.0}


def test_normprop_is_calibrated_again_while_it_trains(digits):
    recipe = dataclasses.replace(TINY, norm="normprop", recalibrate=64)
    often, never = (train(dataclasses.replace(recipe, recalibrate=n), images=digits) for n in (64, 0))
    constants = lambda run: torch.cat([t for k, t in run.model.state_dict().items() if k.endswith(".scale")])
    assert not torch.allclose(constants(often), constants(never))
    assert often.rows[-1].train_loss == pytest.approx(never.rows[-1].train_loss, abs=0.5)


def test_a_network_that_cannot_be_measured_any_more_has_diverged(digits):
    broken = dataclasses.replace(digits, x_train=digits.x_train * 1.0)

    class Break(Observer):
        def started(self, recipe, model, optimizer, *, train, test):
            self.model = model

        def stepped(self, epoch, step, steps, loss):
            with torch.no_grad():
                next(m for m in self.model.modules() if isinstance(m, Site)).weight.fill_(1e25)

    run = train(dataclasses.replace(TINY, norm="normprop", recalibrate=32), images=broken, observer=Break())
    assert run.rows[-1].diverged
    assert run.rows[-1].step == 1


def test_normprop_is_kept_calibrated_unless_told_how_to_calibrate():
    recipe = dataclasses.replace(TINY, norm="normprop")
    found = lambda **changes: dataclasses.replace(recipe, **changes).resolved()
    default = found()
    assert (default.keep_calibrated, default.center, default.calibrate) == (True, "partly", 0)
    assert default == default.resolved() == found(keep_calibrated=True)
    assert found(center="whole").center == "whole"
    for own in (
        {"calibrate": 0},
        {"calibrate": 64},
        {"directions": 4},
        {"shrinkage": 0.5},
        {"recalibrate": 0},
        {"beta": 0.5},
    ):
        asked = found(**own)
        assert (asked.keep_calibrated, asked.center) == (False, "whole"), own
        assert asked.calibrate == own.get("calibrate", 256)
    for norm in ("paper", "batch", "none"):
        assert (found(norm=norm).keep_calibrated, found(norm=norm).center) == (False, "whole")
    with pytest.raises(NormPropError, match="--center partly"):
        found(center="partly", calibrate=64)


def test_filters_of_a_kept_network_lose_as_much_of_their_mean_as_the_recipe_says(digits):
    start = dataclasses.replace(TINY, norm="normprop", epochs=0)
    centers = lambda **changes: {
        m.center for m in train(dataclasses.replace(start, **changes), images=digits).model.modules() if isinstance(m, Site)
    }
    assert len(centers()) > 2
    assert centers(center="whole") == {0.0, 1.0}  # filters of one channel aren't centred


def test_only_normalised_filters_keep_unit_length(digits):
    recipe = dataclasses.replace(TINY, norm="paper", model="nin", width=0.1)
    run = train(recipe, images=digits)
    filters = [m.weight.detach() for m in run.model.modules() if isinstance(m, torch.nn.Conv2d)]
    for weight in filters[:-1]:
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.ones(len(weight)))
    assert (filters[-1].flatten(1).norm(dim=1) - 1).abs().min() > 1e-3


def test_validation_images_are_held_out_and_the_test_set_waits(digits):
    recipe = dataclasses.replace(TINY, validation=200)
    run = train(recipe, images=digits)
    assert [row.test_accuracy is None for row in run.rows] == [True, False]
    assert all(0 < row.validation_accuracy <= 1 for row in run.rows)
    assert all(row.validation_accuracy is None for row in train(TINY, images=digits).rows)
    parts = prepared(digits, recipe.resolved())
    assert (len(parts.x_validation), len(parts.x_train)) == (200, 160)
    assert torch.equal(parts.x_test, digits.x_test)
    everything = digits.hold_out(200)
    both = torch.cat([everything.x_train, everything.x_validation]).flatten(1)
    assert sorted(both.tolist()) == sorted(digits.x_train.flatten(1).tolist())
    with pytest.raises(NormPropError, match="can't be held out"):
        digits.hold_out(1436)


@pytest.mark.parametrize("norm", ["nf", "weight", "none-zero", "evonorm-s0"])
def test_gains_of_any_shape_are_not_decayed(norm, digits):
    recipe = dataclasses.replace(TINY, norm=norm).resolved()
    with processes("cpu") as group:
        model = build_model(recipe, digits, group)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for g in build_optimizer(recipe, model).param_groups for p in g["params"] if g["weight_decay"]}
    assert all(name.endswith(("weight", "original1")) for name in decayed)
    assert len(decayed) == 10, "nine convolutions and a linear layer"


def test_weight_decay_spares_gains_and_biases(digits):
    recipe = TINY.resolved()
    with processes("cpu") as group:
        model = build_model(recipe, digits, group)
    groups = build_optimizer(recipe, model).param_groups
    assert {p.dim() > 1 for g in groups for p in g["params"] if g["weight_decay"]} == {True}
    assert {p.dim() > 1 for g in groups for p in g["params"] if not g["weight_decay"]} == {False}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
