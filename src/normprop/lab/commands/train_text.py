"""`normprop train --model charlstm`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from normprop.errors import NormPropError
from normprop.lab.commands.console import advising, console
from normprop.lab.text import text_training as training
from normprop.lab.text.text_history import TextRow
from normprop.lab.text.text_recipe import TextRecipe


def train_text(
    recipe: TextRecipe,
    *,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    checkpoint_every: int = 500,
    sample: int = 400,
) -> int:
    """Train a character language model with any of four normalisers, and write checkpoint.pt, metrics.jsonl, recipe.json
    and sample.txt.

    For example `normprop train --data shakespeare --model charlstm --norm layer`. The same command with --resume continues a
    run that was interrupted, to the very weights of one that wasn't.

    Args:
        recipe: What to train and how.
        out: Folder for the results; by default runs/DATA-MODEL-NORM-hHIDDEN-sSEED.
        resume: Continue the run in that folder.
        overwrite: Replace the run in that folder.
        device: auto, cpu, cuda, cuda:1, mps …
        threads: Threads for CPU arithmetic; by default torch's choice.
        checkpoint_every: Updates between checkpoints; 0 for one at the end only.
        sample: Characters that the trained model writes.
    """
    if threads is not None:
        if threads < 1:
            raise NormPropError(f"--threads is {threads}.\nUse 1 or more.")
        torch.set_num_threads(threads)
    out = out or default_folder(recipe)
    screen = console()

    def report(row: TextRow) -> None:
        state = "the loss is no longer finite" if row.diverged else f"validation {_bits(row.validation_bits)}"
        screen.print(
            f"update {row.update:>6}/{recipe.updates}  train {_bits(row.train_bits)}  {state}  rate {row.lr:.2g}  "
            f"{row.seconds:.1f} s  {row.characters_per_second:,.0f} characters/s",
            soft_wrap=True,
        )

    with advising(f"The same command with --resume continues from the checkpoint in {out}."):
        run = training.train_text(
            recipe,
            out=out,
            resume=resume,
            overwrite=overwrite,
            device=device,
            checkpoint_every=checkpoint_every,
            sample=sample,
            report=report,
        )
    if run.diverged:
        print(
            f"normprop: the run diverged at a rate of {run.recipe.lr:.3g}; {out / training.METRICS} records it.\n"
            "Try a lower --lr, or a shorter --clip.",
            file=sys.stderr,
        )
        return 1
    screen.print(run.sample, markup=False, soft_wrap=True)
    screen.print(f"test {_bits(run.test_bits)} per character; results in {out}")
    return 0


def default_folder(recipe: TextRecipe) -> Path:
    """The folder for a run's results unless --out names one.

    Example:
        >>> default_folder(TextRecipe()).name
        'shakespeare-charlstm-normprop-h256-s0'
    """
    return Path("runs", f"{Path(recipe.data).stem}-{recipe.model}-{recipe.norm}-h{recipe.hidden}-s{recipe.seed}")


def _bits(bits: float | None) -> str:
    return "–" if bits is None else f"{bits:.3f} bits"
