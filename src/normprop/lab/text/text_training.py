"""The training loop of character models: truncated backpropagation through streams of text."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.errors import NormPropError
from normprop.lab.text.character_model import CharacterLSTM, continued, recurrent_norm
from normprop.lab.text.corpus import Corpus, read
from normprop.lab.text.plain_lstm import Pair
from normprop.lab.text.streams import Streams, bits, rows
from normprop.lab.text.text_history import Report, TextRow, TextRun
from normprop.lab.text.text_recipe import TextRecipe
from normprop.lab.training import checkpoint
from normprop.lab.training.history import to_json_lines
from normprop.lab.training.processes import processes
from normprop.lab.training.schedules import build_schedule
from normprop.lab.whole_file import write_whole

CHECKPOINT, METRICS, RECIPE, SAMPLE = "checkpoint.pt", "metrics.jsonl", "recipe.json", "sample.txt"
# Characters of validation in each evaluation, and how evaluation reads the text.
_VALIDATED = 100_000
_EVALUATION = (32, 200)


def train_text(
    recipe: TextRecipe,
    *,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    checkpoint_every: int = 500,
    sample: int = 400,
    reports: int = 10,
    corpus: Corpus | None = None,
    report: Report | None = None,
) -> TextRun:
    """Train a character model as the recipe says: Adam on cross-entropy, gradients clipped by their length.

    What step does what depends on its number alone, and checkpoints have the recurrent state. So a run that was killed and
    resumed ends with the very weights of one that wasn't.

    Args:
        recipe: What to train and how.
        out: Folder for checkpoint.pt, metrics.jsonl, recipe.json and sample.txt; without one nothing is written.
        resume: Continue from the checkpoint in `out`.
        overwrite: Start again although `out` holds a run.
        device: `auto` or a torch device.
        checkpoint_every: Updates between checkpoints; 0 for one at the end only.
        sample: Characters that the trained model writes.
        reports: Evaluations in the course of the run, 1 or more.
        corpus: The text; by default `recipe.data` is read.
        report: Told of every row.

    Returns:
        The run. When the loss is no longer finite, it ends early and its last row says so; the checkpoint is from before.

    Raises:
        NormPropError: for a recipe that can't be followed, an `out` that holds another run, a checkpoint that can't be
            read or written.
    """
    recipe = recipe.resolved()
    if out and not (resume or overwrite) and (out / CHECKPOINT).exists():
        raise NormPropError(f"{out} already holds a run.\nContinue it with --resume, replace it with --overwrite.")
    corpus = corpus or read(recipe.data, held_out=recipe.held_out)
    with processes(device) as group:
        if group.world > 1:
            raise NormPropError("A model of text is trained by one process.\nStart it without torchrun.")
        trainer = _TextTrainer(recipe, corpus, group.device, report or (lambda _row: None))
        if resume:
            if out is None:
                raise NormPropError("There is no folder to resume from.\nName it with --out.")
            trainer.load(checkpoint.load(out / CHECKPOINT), out / CHECKPOINT)
        elif out:
            (out / CHECKPOINT).unlink(missing_ok=True)
            write_whole(out / RECIPE, json.dumps(dataclasses.asdict(recipe), indent=2).encode())
        trainer.run(out, checkpoint_every, reports)
    text = "" if trainer.diverged else corpus.decoded(continued(trainer.model, corpus.test[:20], sample, seed=recipe.seed))
    if out:
        write_whole(out / SAMPLE, text.encode())
    return TextRun(recipe, trainer.rows, trainer.model, text)


@torch.no_grad()
def bits_per_character(model: CharacterLSTM, text: Tensor) -> float:
    """Cross-entropy of a text in bits per character, in 32 streams that begin without a past."""
    model.eval()
    device, states, total, count = model.head.weight.device, None, 0.0, 0
    for x, y in rows(text, *_EVALUATION):
        scores, states = model(x.to(device), states)
        total += float(F.cross_entropy(scores.flatten(0, 1), y.to(device).flatten(), reduction="sum"))
        count += y.numel()
    return bits(total / count)


class _TextTrainer:
    """A run in progress: what a checkpoint holds, and the loop that moves it on."""

    def __init__(self, recipe: TextRecipe, corpus: Corpus, device: torch.device, report: Report) -> None:
        self.recipe, self.corpus, self.device, self.report = recipe, corpus, device, report
        self.streams = Streams(corpus.train, count=recipe.batch_size, window=recipe.window)
        torch.manual_seed(recipe.seed)
        assert recipe.lr is not None
        self.model = CharacterLSTM(
            len(corpus.symbols),
            recurrent_norm(recipe.norm),
            hidden=recipe.hidden,
            layers=recipe.layers,
            forget_bias=recipe.forget_bias,
            gain=1.0 if recipe.gain is None else recipe.gain,
        ).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.lr)
        self.schedule = build_schedule(
            self.optimizer,
            recipe.schedule,
            total_steps=recipe.updates,
            halve_every=max(1, recipe.updates // 8),
        )
        self.rate = float(self.schedule.get_last_lr()[0])  # of the last step; of the first one before it is done
        self.states: list[Pair] | None = None
        self.update = 0
        self.loss = [0.0, 0]  # nats and steps since the last row
        self.seconds, self.reported = 0.0, 0.0
        self.diverged = False
        self.rows: list[TextRow] = []

    def state(self) -> dict[str, Any]:
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "symbols": self.corpus.symbols,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rate": self.rate,
            "states": self.states,
            "update": self.update,
            "loss": self.loss,
            "seconds": [self.seconds, self.reported],
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        if "symbols" not in state:
            raise NormPropError(f"{path} belongs to a run on images.\nChoose another --out.")
        changes = self.recipe.changes_from(state["recipe"])
        if state["symbols"] != self.corpus.symbols:
            changes.append("another text")
        if changes:
            raise NormPropError(
                f"{path} belongs to a run with other settings: {'; '.join(changes)}.\n"
                "Resume with the same ones, or start another run with another --out."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        states = state["states"]
        self.states = states and [(h.to(self.device), c.to(self.device)) for h, c in states]
        self.rate, self.update, self.loss = state["rate"], state["update"], state["loss"]
        self.seconds, self.reported = state["seconds"]
        self.rows = [TextRow(**row) for row in state["rows"]]

    def run(self, out: Path | None, checkpoint_every: int, reports: int) -> None:
        recipe = self.recipe
        every = max(1, recipe.updates // reports)
        while self.update < recipe.updates and not self.diverged:
            began = time.perf_counter()
            loss = self._take_step()
            self.diverged = not math.isfinite(loss)
            if not self.diverged:
                self.update += 1
                self.loss = [self.loss[0] + loss, self.loss[1] + 1]
            self.seconds += time.perf_counter() - began
            if self.diverged or self.update % every == 0 or self.update == recipe.updates:
                self._add_row()
                if out:  # written whole: a file that is appended to would hold some rows twice after --resume
                    write_whole(out / METRICS, to_json_lines(self.rows))
            at_rest = self.update == recipe.updates or (checkpoint_every and self.update % checkpoint_every == 0)
            if out and at_rest and not self.diverged:
                checkpoint.save(out / CHECKPOINT, self.state())

    def _take_step(self) -> float:
        """The loss of one step; if it isn't finite, the weights stay as they were."""
        self.model.train()
        if self.streams.begins(self.update):
            self.states = None
        x, y = (part.to(self.device) for part in self.streams.window(self.update))
        scores, states = self.model(x, self.states)
        loss = F.cross_entropy(scores.flatten(0, 1), y.flatten())
        found = float(loss.detach())
        if not math.isfinite(found):
            return math.nan
        self.optimizer.zero_grad()
        loss.backward()
        if self.recipe.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.states = [(h.detach(), c.detach()) for h, c in states]
        return found

    def _add_row(self) -> None:
        nats, steps = self.loss
        spent = self.seconds - self.reported
        validation = test = None
        if not self.diverged:
            validation = bits_per_character(self.model, self.corpus.validation[:_VALIDATED])
            self.diverged = not math.isfinite(validation)
        if self.diverged:
            validation = None
        elif self.update == self.recipe.updates:
            test = bits_per_character(self.model, self.corpus.test)
        row = TextRow(
            update=self.update,
            lr=self.rate,
            train_bits=bits(nats / steps) if steps else None,
            validation_bits=validation,
            test_bits=test,
            seconds=self.seconds,
            characters_per_second=steps * self.recipe.window * self.recipe.batch_size / spent if spent else 0.0,
            diverged=self.diverged,
        )
        self.rows.append(row)
        self.loss, self.reported = [0.0, 0], self.seconds
        self.report(row)
