"""The time of an epoch with each normaliser: training steps of the whole recipe, timed in turns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from normprop.lab.cost.rounds import Step, measure
from normprop.lab.reproduction.runs import CONTENDERS, recipe
from normprop.lab.reproduction.scale import Scale
from normprop.lab.samples.batches import Batches
from normprop.lab.samples.images import Images
from normprop.lab.training.optimizer import build_optimizer
from normprop.lab.training.preparation import build_model, placed, prepared
from normprop.lab.training.processes import Processes
from normprop.lab.training.recipe import Recipe

RIVAL = "batch"


def measure_speed(scale: Scale, images: Images, device: str) -> dict[str, Any]:
    """Processor seconds of an epoch per normaliser, and their ratio to BatchNorm's, both with quartiles.

    A step is that of the paper's recipe at batch size 50: standardising the input, forward, backward, SGD, clipping and
    projection where the recipe has them. On a GPU it is wall-clock time.
    """
    recipes = {name: recipe(scale, name) for name in CONTENDERS}
    images = prepared(images, recipes[RIVAL])
    place = torch.device(device)
    steps = {name: _step(run, images, place) for name, run in recipes.items()}
    rounds = measure(steps, seconds=scale.speed_seconds, device=place)
    clock: Any = "cpu" if place.type == "cpu" else "wall"
    count = len(images.x_train) // recipes[RIVAL].batch_size
    result: dict[str, Any] = {"clock": clock, "rounds": len(rounds), "steps": count, "threads": torch.get_num_threads()}
    for name in CONTENDERS:
        step, ratio = rounds.seconds(name, clock), rounds.ratio(name, RIVAL, clock)
        result[name] = {
            "epoch_seconds": [count * value for value in (step.low, step.median, step.high)],
            "ratio": [ratio.low, ratio.median, ratio.high],
        }
    return result


def _step(run: Recipe, images: Images, device: torch.device) -> Step:
    group = Processes(device)
    model = build_model(run, images, group).train()
    optimizer = build_optimizer(run, model)
    x, y = _first_batch(run, images, group)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _first_batch(run: Recipe, images: Images, group: Processes) -> tuple[Tensor, Tensor]:
    x, y = Batches(images.x_train, images.y_train, batch_size=run.batch_size, seed=run.seed, epoch=0).batch(0)
    return placed(x, group), y.to(group.device)
