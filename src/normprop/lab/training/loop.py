"""The training loop: one for the command line, the demo, the comparisons and the tests."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normprop.conversion.recalibration import recalibrate
from normprop.errors import NormPropError, NotFiniteError
from normprop.lab.samples.batches import Batches
from normprop.lab.samples.datasets import load
from normprop.lab.samples.images import Images
from normprop.lab.samples.seeds import derived
from normprop.lab.training import checkpoint
from normprop.lab.training.history import Row, Run, to_json_lines
from normprop.lab.training.observer import Observer
from normprop.lab.training.optimizer import build_optimizer
from normprop.lab.training.preparation import build_model, kept, placed, prepared, some
from normprop.lab.training.processes import Processes, processes
from normprop.lab.training.recipe import Recipe
from normprop.lab.training.schedules import build_schedule
from normprop.lab.whole_file import check_folder, write_whole

CHECKPOINT, METRICS, RECIPE = "checkpoint.pt", "metrics.jsonl", "recipe.json"


def train(
    recipe: Recipe,
    *,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    checkpoint_every: int = 1000,
    images: Images | None = None,
    observer: Observer | None = None,
) -> Run:
    """Train as the recipe says: SGD on cross-entropy, in this process or shared with the others that torchrun started.

    Order, augmentation and dropout depend on (seed, epoch, step) alone. So a run that was killed and resumed ends with
    the very weights of one that wasn't, and processes see together the batches that one alone would see.

    Args:
        recipe: What to train and how.
        out: Folder for checkpoint.pt, metrics.jsonl and recipe.json; without one nothing is written.
        resume: Continue from the checkpoint in `out`.
        overwrite: Start again although `out` holds a run.
        device: `auto` or a torch device.
        checkpoint_every: Steps between checkpoints within an epoch; 0 for one after each epoch only.
        images: The data; by default `recipe.data` is loaded.
        observer: Told how the run goes, in the process that writes.

    Returns:
        The run. When the loss is no longer finite, it ends early and its last row says so; the checkpoint is from before.

    Raises:
        NormPropError: for a recipe that can't be followed, an `out` that holds another run, a checkpoint that can't be
            read or written.
    """
    recipe = recipe.resolved()
    if out:
        check_folder(out)
    if out and not (resume or overwrite) and (out / CHECKPOINT).exists():
        raise NormPropError(f"{out} already holds a run.\nContinue it with --resume, replace it with --overwrite.")
    images = images or load(recipe.data, image_size=recipe.image_size)
    images = prepared(images, recipe)
    with processes(device) as group:
        recipe.check_fits(images, world=group.world)
        trainer = _Trainer(recipe, images, group, (observer or Observer()) if group.writes else Observer())
        if resume:
            if out is None:
                raise NormPropError("There is no folder to resume from.\nName it with --out.")
            trainer.load(checkpoint.load(out / CHECKPOINT), out / CHECKPOINT)
        elif out and group.writes:
            (out / CHECKPOINT).unlink(missing_ok=True)
            write_whole(out / RECIPE, json.dumps(dataclasses.asdict(recipe), indent=2).encode())
        return trainer.run(out if group.writes else None, checkpoint_every)


def _seed_dropout(seed: int, group: Processes) -> None:
    # torch.manual_seed also records a stack trace per kind of device, which is slow beside a step at batch size 1.
    if group.device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, group: Processes, *, batch_size: int = 128) -> float:
    """Share of the samples `x` for which the model, in evaluation mode, finds their classes `y`."""
    model.eval()
    right = 0.0
    for xs, ys in zip(*(part[group.rank :: group.world].split(batch_size) for part in (x, y)), strict=True):
        right += float((model(placed(xs, group)).argmax(1) == ys.to(group.device)).sum())
    return group.total([right])[0] / len(x)


class _Trainer:
    """A run in progress: what a checkpoint holds, and the loop that moves it on."""

    def __init__(self, recipe: Recipe, images: Images, group: Processes, observer: Observer) -> None:
        self.recipe, self.images, self.group, self.observer = recipe, images, group, observer
        self.model = build_model(recipe, images, group)
        self.optimizer = build_optimizer(recipe, self.model)
        self.calibration = kept(recipe, self.model, self.optimizer, images, group)
        assert recipe.halve_every is not None
        steps = len(images.x_train) // recipe.batch_size
        self.schedule = build_schedule(
            self.optimizer, recipe.schedule, total_steps=recipe.epochs * steps, halve_every=recipe.halve_every * steps
        )
        self.rate = float(self.schedule.get_last_lr()[0])  # of the last step; of the first one before it is done
        self.epoch = 0
        self.step = 0  # within the epoch
        self.sums = [0.0, 0.0, 0.0]  # loss, right answers, samples of the epoch so far, over all processes
        self.seconds = 0.0
        self.rows: list[Row] = []

    def state(self) -> dict[str, Any]:
        calibration = {"calibration": self.calibration.state_dict()} if self.calibration else {}
        return calibration | {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rate": self.rate,
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "seconds": self.seconds,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        if not (isinstance(state.get("recipe"), dict) and self.state().keys() <= state.keys()):
            raise NormPropError(f"{path} doesn't hold all of a run.\nStart again with --overwrite.")
        changes = self.recipe.changes_from(state["recipe"])
        if changes:
            raise NormPropError(
                f"{path} belongs to a run with other settings: {'; '.join(changes)}.\n"
                "Resume with the same ones, or start another run with another --out."
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, kept in self.optimizer.state.items():
                for key, value in kept.items():
                    if isinstance(value, Tensor) and value.dim():
                        checkpoint.check_alike(value, parameter.detach(), f"the optimiser's {key}")
            own = self.state()
            for part in ("schedule", "rate", "epoch", "step", "sums", "seconds", "rows"):
                checkpoint.check_alike(state[part], own[part], part)
            if self.calibration:
                checkpoint.check_alike(state["calibration"], own["calibration"], "calibration")
                self.calibration.load_state_dict(state["calibration"])
            self.schedule.load_state_dict(state["schedule"])
            self.epoch, self.step, self.rate = state["epoch"], state["step"], state["rate"]
            self.sums, self.seconds = state["sums"], state["seconds"]
            self.rows = [Row(**row) for row in state["rows"]]
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise NormPropError(
                f"{path} doesn't fit the network: {(str(error) or type(error).__name__).splitlines()[0]}\n"
                "Use the version that wrote it, or start again with --overwrite."
            ) from error

    def run(self, out: Path | None, checkpoint_every: int) -> Run:
        recipe, images, group = self.recipe, self.images, self.group
        self.observer.started(recipe, self.model, self.optimizer, train=len(images.x_train), test=len(images.x_test))
        parallel = group.parallel(self.model)
        for epoch in range(self.epoch, recipe.epochs):
            batches = Batches(
                images.x_train,
                images.y_train,
                batch_size=recipe.batch_size,
                seed=recipe.seed,
                epoch=epoch,
                flips=recipe.flips,
                crops=recipe.crops,
            )
            parallel.train()
            for step in range(self.step, len(batches)):
                measured = self._recalibrate(epoch * len(batches) + step)
                loss = self._take_step(parallel, batches, step) if measured else math.nan
                if not math.isfinite(loss):
                    self._end_epoch(len(batches), diverged=True)
                    self._write_metrics(out)
                    return Run(recipe, self.rows, self.model)
                self.step = step + 1
                self.observer.stepped(epoch + 1, step + 1, len(batches), loss)
                if out and checkpoint_every and self.step % checkpoint_every == 0 and self.step < len(batches):
                    checkpoint.save(out / CHECKPOINT, self.state())
            self._end_epoch(len(batches))
            if out:
                checkpoint.save(out / CHECKPOINT, self.state())
            self._write_metrics(out)
        return Run(recipe, self.rows, self.model)

    def _recalibrate(self, steps: int) -> bool:
        """Recalibrate if that is due after so many steps, on samples that depend on the step alone; False if it fails."""
        recipe = self.recipe
        if not recipe.recalibrate or steps == 0 or steps % max(1, recipe.recalibrate // recipe.batch_size):
            return True
        began = time.perf_counter()
        standardize, network = self.model.children()
        samples = some(self.images, derived(recipe.seed, -2, steps), recipe.calibrate or 0)
        x = standardize(placed(samples, self.group))
        try:
            recalibrate(network, self.optimizer, x, **recipe.covariance())
        except NotFiniteError:
            return False
        self.seconds += time.perf_counter() - began
        return True

    def _take_step(self, parallel: nn.Module, batches: Batches, step: int) -> float:
        """The loss of one step over all processes; if it isn't finite, the weights stay as they were."""
        recipe, group = self.recipe, self.group
        began = time.perf_counter()
        x, y = batches.batch(step, rank=group.rank, world=group.world)
        x, y = placed(x, group), y.to(group.device)
        _seed_dropout(derived(recipe.seed, self.epoch, step, group.rank), group)
        with torch.autocast(group.device.type, torch.bfloat16, enabled=recipe.dtype == "bf16"):
            scores = parallel(x)
            loss = F.cross_entropy(scores, y)
        right = (scores.detach().argmax(1) == y).sum()
        sums = group.total([loss.detach() * len(y), right, len(y)])
        if not math.isfinite(sums[0]):
            return math.nan
        self.optimizer.zero_grad()
        loss.backward()
        self.rate = float(self.schedule.get_last_lr()[0])
        try:
            self.optimizer.step()
        except NotFiniteError:  # of a measurement behind the step
            return math.nan
        self.schedule.step()
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.seconds += time.perf_counter() - began
        return sums[0] / sums[2]

    def _end_epoch(self, steps: int, *, diverged: bool = False) -> None:
        """Record the epoch and begin the next one."""
        loss, right, seen = self.sums
        row = Row(
            epoch=self.epoch + 1,
            step=self.epoch * steps + self.step,
            lr=self.rate,
            train_loss=loss / seen if seen else None,
            train_accuracy=right / seen if seen else None,
            test_accuracy=None if diverged else self._test_accuracy(),
            seconds=self.seconds,
            images_per_second=seen / self.seconds if self.seconds else 0.0,
            diverged=diverged,
            validation_accuracy=None if diverged else self._validation_accuracy(),
        )
        self.rows.append(row)
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, [0.0, 0.0, 0.0], 0.0
        self.observer.ended_epoch(row, self.recipe.epochs)

    def _test_accuracy(self) -> float | None:
        """None before the last epoch where there are validation images: the test set waits until the end."""
        images = self.images
        if images.x_validation is not None and self.epoch + 1 < self.recipe.epochs:
            return None
        return accuracy(self.model, images.x_test, images.y_test, self.group)

    def _validation_accuracy(self) -> float | None:
        x, y = self.images.x_validation, self.images.y_validation
        return None if x is None or y is None else accuracy(self.model, x, y, self.group)

    def _write_metrics(self, out: Path | None) -> None:
        # Written whole: a file that is appended to would hold some epochs twice after --resume.
        if out:
            write_whole(out / METRICS, to_json_lines(self.rows))
