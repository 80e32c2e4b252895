"""`normprop train`."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from normprop.errors import NormPropError
from normprop.lab.commands.console import advising, console, percent
from normprop.lab.commands.progress import RunDisplay
from normprop.lab.training import loop as training
from normprop.lab.training.event_file import EventFile
from normprop.lab.training.observer import Observer, Observers
from normprop.lab.training.recipe import Recipe


def train(
    recipe: Recipe,
    *,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    checkpoint_every: int = 1000,
    tensorboard: bool = False,
) -> int:
    """Train a network on a data set with any normaliser, and write checkpoint.pt, metrics.jsonl and recipe.json.

    For example `normprop train --data fashion-mnist --model nin --width 0.25 --batch-size 1 --epochs 1`. The same command
    with --resume continues a run that was interrupted, to the very weights of one that wasn't. A model of text has options
    of its own: `normprop train --model charlstm --help`.

    Args:
        recipe: What to train and how.
        out: Folder for the results; by default runs/DATA-MODEL-NORM-bSIZE-sSEED.
        resume: Continue the run in that folder.
        overwrite: Replace the run in that folder.
        device: auto, cpu, cuda, cuda:1, mps …
        threads: Threads for CPU arithmetic; by default torch's choice.
        checkpoint_every: Steps between checkpoints within an epoch; 0 for one after each epoch only.
        tensorboard: Write event files into OUT/tensorboard beside metrics.jsonl.
    """
    if threads is not None:
        if threads < 1:
            raise NormPropError(f"--threads is {threads}.\nUse 1 or more.")
        torch.set_num_threads(threads)
    out = out or default_folder(recipe)
    screen = console()
    advice = f"The same command with --resume continues from the checkpoint in {out}."
    with ExitStack() as stack, advising(advice):
        observers: list[Observer] = [stack.enter_context(closing(RunDisplay(screen)))]
        if tensorboard and not int(os.environ.get("RANK", 0)):
            observers.append(stack.enter_context(closing(EventFile(out / "tensorboard"))))
        run = training.train(
            recipe,
            out=out,
            resume=resume,
            overwrite=overwrite,
            device=device,
            checkpoint_every=checkpoint_every,
            observer=Observers(*observers),
        )
    if int(os.environ.get("RANK", 0)):
        return int(run.diverged)
    if run.diverged:
        print(
            f"normprop: the run diverged at a rate of {run.recipe.lr:.3g}; {out / training.METRICS} records it.\n"
            "Try a lower --lr, or adaptive gradient clipping: --clip 0.05.",
            file=sys.stderr,
        )
        return 1
    screen.print(f"test accuracy {percent(run.test_accuracy)}; results in {out}")
    return 0


def default_folder(recipe: Recipe) -> Path:
    """The folder for a run's results unless --out names one.

    Example:
        >>> default_folder(Recipe(norm="batch", batch_size=64)).name
        'digits-nin-batch-b64-s0'
    """
    settings = (recipe.model.replace(":", "-"), recipe.norm, f"b{recipe.batch_size}", f"s{recipe.seed}")
    return Path("runs", "-".join((Path(recipe.data).stem, *settings)))
