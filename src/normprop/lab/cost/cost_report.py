"""The report of a measurement: every sample, the machine, the command."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normprop.errors import NormPropError
from normprop.lab.cost.contenders import SUBJECT
from normprop.lab.cost.machine import Machine
from normprop.lab.cost.memory import PeakMemory
from normprop.lab.cost.quartiles import Quartiles
from normprop.lab.cost.rounds import Clock, Rounds
from normprop.lab.cost.workload import Workload

_FORMAT = "normprop bench 1"

# Names of what is timed besides the contenders.
LANE, READING, CONVERT, FOLD, STEP = "lane", "reading", "convert", "fold", "step"


@dataclass(frozen=True)
class BatchCost:
    """The cost of contenders at one batch size.

    Attributes:
        batch_size: Samples per batch.
        training: Steps of the contenders, of the moment lane alone (`lane`) and of one reading of its weights (`reading`).
        inference: Forwards of the contenders; converted ones are folded.
        memory: Peak memory of training by contender; empty if it wasn't measured.
        failures: The reason by contender that can't train at this batch size.
        first_step: Seconds of each contender's first training step, with compilation where there is any.
    """

    batch_size: int
    training: Rounds
    inference: Rounds
    memory: dict[str, PeakMemory] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    first_step: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CostReport:
    """The results of `measure_cost`.

    Attributes:
        machine: The machine that was measured on.
        workload: The setting of all contenders.
        rivals: The contenders that NormProp was compared with.
        seconds: The time for each measurement.
        weight_bytes: Size of the plain network's parameters.
        batches: The cost at each batch size.
        construction: Conversion, folding, and a training step of the first rival at `construction_batch`.
        construction_batch: The smallest batch size at which this rival trains.
    """

    machine: Machine
    workload: Workload
    rivals: tuple[str, ...]
    seconds: float
    weight_bytes: int
    batches: tuple[BatchCost, ...]
    construction: Rounds
    construction_batch: int

    @property
    def command(self) -> str:
        """The command that measures the same again."""
        work = self.workload
        sizes = " ".join(str(batch.batch_size) for batch in self.batches)
        options = {
            "--shape": "x".join(map(str, work.shape)),
            "--classes": work.classes,
            "--width": f"{work.width:g}" if work.width != 1 else "",
            "--accumulate": work.accumulate if work.accumulate > 1 else "",
            "--threads": work.threads,
            "--device": work.device,
            "--seconds": f"{self.seconds:g}",
        }
        flags = {
            "--compile": work.compiled,
            "--channels-last": work.channels_last,
            "--skip-memory": not any(batch.memory for batch in self.batches),
        }
        parts = [f"normprop bench {work.model} --batch-size {sizes} --against {' '.join(self.rivals)}"]
        parts += [f"{name} {value}" for name, value in options.items() if value != ""]
        return " ".join([*parts, *(name for name, given in flags.items() if given)])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists: all samples, and the quartiles of what they say."""
        derived = {"command": self.command, "quartiles": [self._quartiles(batch) for batch in self.batches]}
        return {"format": _FORMAT, **asdict(self), **derived}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def load(cls, path: Path) -> CostReport:
        """Read a file that `normprop bench --out` wrote.

        Raises:
            NormPropError: for a file that is missing, damaged, or no such report.
        """
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NormPropError(
                f"{path} can't be read as a result of normprop bench: {error}.\nWrite one with normprop bench --out {path}."
            ) from error

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CostReport:
        """The report that `to_dict` returned.

        Raises:
            ValueError: for another format.
        """
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        workload = Workload(**{**data["workload"], "shape": tuple(data["workload"]["shape"])})
        return cls(
            machine=Machine(**data["machine"]),
            workload=workload,
            rivals=tuple(data["rivals"]),
            seconds=data["seconds"],
            weight_bytes=data["weight_bytes"],
            batches=tuple(_batch(b) for b in data["batches"]),
            construction=Rounds(**data["construction"]),
            construction_batch=data["construction_batch"],
        )

    def _quartiles(self, batch: BatchCost) -> dict[str, Any]:
        found: dict[str, Any] = {"batch_size": batch.batch_size}
        clocks: tuple[Clock, ...] = ("wall", "cpu")
        for kind, rounds in (("training", batch.training), ("inference", batch.inference)):
            for clock in clocks:
                seconds = {name: rounds.seconds(name, clock) for name in rounds.wall}
                found[f"{kind}_{clock}_seconds"] = _plain(seconds)
                ratios = {rival: ratio(rounds, rival, clock) for rival in self.rivals}
                found[f"{kind}_{clock}_ratio"] = _plain({k: r for k, r in ratios.items() if r is not None})
        return found


def ratio(rounds: Rounds, rival: str, clock: Clock = "wall") -> Quartiles | None:
    """NormProp's time over a rival's; None where the rival wasn't timed.

    Example:
        >>> ratio(Rounds({"normprop": [2.0], "plain": [1.0]}, {}), "plain").median
        2.0
    """
    return rounds.ratio(SUBJECT, rival, clock) if rival in rounds.wall else None


def _plain(quartiles: dict[str, Quartiles]) -> dict[str, dict[str, float]]:
    return {name: asdict(q) for name, q in quartiles.items()}


def _batch(data: dict[str, Any]) -> BatchCost:
    memory = {name: PeakMemory(**peak) for name, peak in data["memory"].items()}
    rounds = {kind: Rounds(**data[kind]) for kind in ("training", "inference")}
    return BatchCost(**{**data, **rounds, "memory": memory})
