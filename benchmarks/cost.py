"""Run every benchmark of docs/cost.md and write its tables.

    python benchmarks/cost.py                    # what has no result yet, then the page
    python benchmarks/cost.py --fresh            # all of it: about half an hour on two idle cores
    python benchmarks/cost.py --only resnet20    # that one again
    python benchmarks/cost.py --report           # the page alone, from benchmarks/results/cost

Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from normprop.lab.cost.contenders import CONTENDERS
from normprop.lab.cost.cost_report import BatchCost, CostReport, ratio
from normprop.lab.cost.cost_tables import caption, tables
from normprop.lab.cost.quartiles import Quartiles
from normprop.lab.pages.marked_page import filled
from normprop.lab.pages.text_table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks", "results", "cost")
GROWTH = Path("benchmarks", "results", "lane_growth.json")
PAGE = ROOT / "docs" / "cost.md"

_SHORT = "--threads 2 --seconds 6"
_ALL = "--against plain batch group layer --threads 2 --seconds 6"
_CALIBRATED = "--against plain calibrated --threads 2 --seconds 6 --skip-memory"
_COMPILED = "--against plain batch --threads 2 --seconds 6 --compile --skip-memory"
RUNS = {
    "resnet20": f"resnet20 --batch-size 1 8 64 {_ALL}",
    "resnet18": f"resnet18 --batch-size 1 8 64 {_ALL}",
    "mobilenet-224": f"torchvision:mobilenet_v3_small --batch-size 1 8 --against plain batch --shape 3x224x224 {_SHORT}",
    "mobilenet-96": f"torchvision:mobilenet_v3_small --batch-size 1 8 --against plain batch --shape 3x96x96 {_SHORT}",
    "resnet50": f"torchvision:resnet50 --batch-size 4 {_ALL}",
    "resnet20-compiled": f"resnet20 --batch-size 1 8 64 {_COMPILED}",
    "resnet18-compiled": f"resnet18 --batch-size 1 8 64 {_COMPILED}",
    "resnet50-compiled": f"torchvision:resnet50 --batch-size 4 {_COMPILED}",
    "resnet20-accumulated": "resnet20 --batch-size 1 --accumulate 8 --against plain --threads 2 --seconds 6 --skip-memory",
    "resnet18-accumulated": "resnet18 --batch-size 1 --accumulate 8 --against plain --threads 2 --seconds 6 --skip-memory",
    "resnet20-calibrated": f"resnet20 --batch-size 1 8 64 {_CALIBRATED}",
    "resnet18-calibrated": f"resnet18 --batch-size 1 8 64 {_CALIBRATED}",
}
GROWTH_COMMAND = "--seconds 1 --threads 1"


@dataclass(frozen=True)
class Bar:
    """What a ratio is to stay under.

    Attributes:
        run: Which of the runs, by the beginning of its name; compiled and accumulated ones by their whole name.
        batch: Batch size; None for all.
        kind: training or inference.
        rival: What NormProp is compared with.
        most: The largest ratio.
    """

    run: str
    batch: int | None
    kind: str
    rival: str
    most: float


_SMALL = ("resnet20", "resnet18")
BARS = (
    *(Bar(run, 64, "training", "plain", 1.03) for run in _SMALL),
    *(Bar(run, 64, "training", "batch", 0.95) for run in _SMALL),
    *(Bar(run, 8, "training", "plain", 1.12) for run in _SMALL),
    *(Bar(run, 1, "training", "plain", 1.25) for run in _SMALL),
    Bar("mobilenet-224", 8, "training", "plain", 1.1),
    Bar("mobilenet-224", 1, "training", "plain", 1.35),
    Bar("mobilenet-96", 8, "training", "plain", 1.15),
    Bar("mobilenet-96", 1, "training", "plain", 1.4),
    Bar("resnet50", 4, "training", "plain", 1.05),
    *(Bar(f"{run}-compiled", size, "training", "batch", 1.0) for run in _SMALL for size in (8, 64)),
    *(Bar(f"{run}-compiled", 1, "training", "batch", 1.1) for run in _SMALL),
    Bar("resnet50-compiled", 4, "training", "batch", 1.0),
    *(Bar(run, None, "inference", "plain", 1.02) for run in (*_SMALL, "resnet50")),
    *(Bar(run, None, "inference", "plain", 1.02) for run in ("mobilenet-224", "mobilenet-96")),
)
# Peak memory: at most the plain network's and so many copies of the weights; below BatchNorm's from this batch size on.
COPIES, BELOW_BATCHNORM = 2.0, 64


def run(name: str) -> None:
    """One benchmark in a process of its own."""
    if name == "lane_growth":
        command = [sys.executable, "benchmarks/lane_growth.py", *shlex.split(GROWTH_COMMAND)]
    else:
        (ROOT / RESULTS).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "normprop", "bench", *shlex.split(RUNS[name]), "--out", str(path_of(name))]
    print(shlex.join(command[1:]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def path_of(name: str) -> Path:
    return GROWTH if name == "lane_growth" else RESULTS / f"{name}.json"


def reports() -> dict[str, CostReport]:
    return {name: CostReport.load(ROOT / path_of(name)) for name in RUNS if (ROOT / path_of(name)).exists()}


def verdict(quartiles: Quartiles, most: float) -> str:
    """Whether the middle half of the rounds lies on one side of a bar.

    Example:
        >>> verdict(Quartiles(1.0, 1.01, 1.02), 1.05), verdict(Quartiles(1.0, 1.1, 1.2), 1.05)
        ('yes', 'undecided')
    """
    return "yes" if quartiles.high <= most else "no" if quartiles.low > most else "undecided"


def bar_rows(found: dict[str, CostReport]) -> Iterator[tuple[str, ...]]:
    for bar in BARS:
        for batch in found[bar.run].batches if bar.run in found else ():
            if bar.batch not in (None, batch.batch_size):
                continue
            rounds = batch.training if bar.kind == "training" else batch.inference
            wall, cpu = ratio(rounds, bar.rival), ratio(rounds, bar.rival, "cpu")
            if wall and cpu:
                what = f"{bar.kind}, {bar.run}, batch {batch.batch_size}, over {CONTENDERS[bar.rival].title}"
                yield what, f"≤ {bar.most:g}", str(wall), verdict(wall, bar.most), str(cpu), verdict(cpu, bar.most)


def memory_rows(found: dict[str, CostReport]) -> Iterator[tuple[str, ...]]:
    for name, report in found.items():
        for batch in report.batches:
            if {"normprop", "plain"} <= batch.memory.keys():
                yield _copies_row(name, batch, report.weight_bytes)
            if batch.batch_size >= BELOW_BATCHNORM and {"normprop", "batch"} <= batch.memory.keys():
                share = batch.memory["normprop"].allocated / batch.memory["batch"].allocated
                answer = "yes" if share < 1 else "no"
                yield f"memory, {name}, batch {batch.batch_size}, over BatchNorm", "< 1", f"{share:.3f}", answer, "", ""


def _copies_row(name: str, batch: BatchCost, weight_bytes: int) -> tuple[str, ...]:
    copies = (batch.memory["normprop"].allocated - batch.memory["plain"].allocated) / weight_bytes
    what = f"memory, {name}, batch {batch.batch_size}, beyond no normaliser"
    answer = "yes" if copies <= COPIES else "no"
    return what, f"≤ {COPIES:g} copies of the weights", f"{copies:+.2f} copies", answer, "", ""


def bars(found: dict[str, CostReport]) -> str:
    columns = ("what", "bar", "median [quartiles]", "met", "by CPU time", "met")
    return Table(columns, [*bar_rows(found), *memory_rows(found)], "Bars", words=(0, 1, 3, 5)).markdown()


def section(report: CostReport) -> str:
    return "\n\n".join([f"    {report.command}", caption(report), *(table.markdown() for table in tables(report))])


def growth() -> str:
    done = subprocess.run(
        [sys.executable, "benchmarks/lane_growth.py", "--report"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout.rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.add_argument("--only", nargs="+", choices=(*RUNS, "lane_growth"), help="run these again")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    for name in () if options.report else options.only or (*RUNS, "lane_growth"):
        if options.fresh or options.only or not (ROOT / path_of(name)).exists():
            run(name)
    found = reports()
    texts = {name: section(report) for name, report in found.items()} | {"bars": bars(found)}
    if (ROOT / GROWTH).exists():
        texts["lane_growth"] = growth()
    PAGE.write_text(filled(PAGE.read_text(), texts))


if __name__ == "__main__":
    main()
