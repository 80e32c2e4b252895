"""Other optimizers, event files, the bar of a run, a folder of images."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from normprop.lab.commands.progress import RunDisplay
from normprop.lab.samples.datasets import load
from normprop.lab.training.event_file import EventFile
from normprop.lab.training.loop import train
from normprop.lab.training.observer import Observer, Observers
from normprop.lab.training.recipe import RATES, Recipe

TINY = Recipe(model="mlp", width=0.1, batch_size=32, epochs=2, train_images=96, calibrate=32, recalibrate=64)


class _StopError(Exception):
    pass


class _Stop(Observer):
    """Ends a run after some steps of the second epoch."""

    def stepped(self, epoch: int, step: int, steps: int, loss: float) -> None:
        if (epoch, step) == (2, 2):
            raise _StopError


@pytest.mark.parametrize("name", RATES)
def test_every_optimizer_trains_and_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY, optimizer=name)
    images = load("digits")
    whole = train(recipe, images=images, device="cpu")
    assert whole.rows[1].train_loss < whole.rows[0].train_loss
    with pytest.raises(_StopError):
        train(recipe, images=images, device="cpu", out=tmp_path, observer=_Stop(), checkpoint_every=1)
    again = train(recipe, images=images, device="cpu", out=tmp_path, resume=True)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_recipes_from_before_there_was_a_choice_go_on() -> None:
    earlier = {k: v for k, v in dataclasses.asdict(TINY).items() if k != "optimizer"}
    assert TINY.changes_from(earlier) == []
    assert dataclasses.replace(TINY, optimizer="adamw").changes_from(earlier) == ["--optimizer sgd → adamw"]


def test_event_files_hold_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = EventFile(tmp_path)
    run = train(TINY, images=load("digits"), device="cpu", observer=Observers(Observer(), writer))
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("train_loss", "test_accuracy", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row.step, pytest.approx(getattr(row, name), rel=1e-6)) for row in run.rows]


def test_the_bar_counts_the_steps_of_the_whole_run() -> None:
    display = RunDisplay(Console(file=io.StringIO(), force_terminal=True, width=200))
    seen = []

    class Look(Observer):
        def stepped(self, epoch: int, step: int, steps: int, loss: float) -> None:
            assert display.bar is not None
            (task,) = display.bar.tasks
            seen.append((task.completed, task.total))

    train(TINY, images=load("digits"), device="cpu", observer=Observers(display, Look()))
    display.close()
    assert seen == [(step, 6) for step in range(1, 7)]


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_that_takes_longer_is_pointed_out(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normprop.lab.commands.progress.computes_bfloat16", lambda device: has)
    for dtype in ("float32", "bf16"):
        screen = io.StringIO()
        display = RunDisplay(Console(file=screen, width=200))
        recipe = dataclasses.replace(TINY, dtype=dtype, epochs=1)
        train(recipe, images=load("digits"), device="cpu", observer=Observers(display, Observer()))
        display.close()
        assert ("no bfloat16" in screen.getvalue()) == (dtype == "bf16" and not has)


def test_a_folder_of_images_trains(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 10)):
        for label, shape in (("lying", (9, 1, 1)), ("standing", (1, 9, 1))):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                stripes = np.broadcast_to(random.integers(0, 256, shape, dtype=np.uint8), (9, 9, 3))
                Image.fromarray(np.ascontiguousarray(stripes)).save(folder / f"{i}.png")
    recipe = dataclasses.replace(TINY, train_images=None, batch_size=4, epochs=6, lr=0.02, calibrate=8)
    run = train(recipe, images=load(str(tmp_path), image_size=8), device="cpu")
    assert run.test_accuracy >= 0.9
