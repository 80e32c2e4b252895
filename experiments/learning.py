"""Run the comparisons of docs/laboratory.md and write its tables.

    python experiments/learning.py                      # what isn't finished yet, then the page; a killed one continues
    python experiments/learning.py --only resnet8       # that one alone
    python experiments/learning.py --report             # the page from the runs that are there

Runs are kept in --out, by default runs/learning, one JSON line each. Tables, figures and the runs of each comparison go to
experiments/results/NAME. A run takes half a minute to two of one core; several such commands share the work.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from normprop.lab.pages.marked_page import filled

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGE = ROOT / "docs" / "laboratory.md"
SHOWN = {
    "rate.png": "validation accuracy against the learning rate",
    "batch_size.png": "test accuracy against the batch size",
    "curves.png": "validation accuracy over epochs",
}
FILES = ("table.md", "table.json", "runs.jsonl", *SHOWN)

_ALL = "normprop batch frozen group layer instance ws frn evonorm-s0 nf weight none none-zero"
_LARGE = "--norms normprop batch --batch-sizes 64 256 --rates 0.05 0.1 0.2 0.4 0.8 --clips 0 0.05 --dtype bf16"
_FEW = _LARGE.replace("0.05 0.1 0.2 0.4 0.8", "0.03 0.1 0.3 0.9")
_HIGH = _FEW.replace("0.03 0.1 0.3 0.9", "0.1 0.3 0.9 2.7")
_SMALL = f"--norms {_ALL} --batch-sizes 1 2 4 8 --rates 0.03 0.1 0.3 1 --clips 0 0.05 --validation 2000"
# What they were run with before `normprop.keep_calibrated` became the default.
_CALIBRATED = "--no-keep-calibrated"
_SEEDS = f"--seeds 3 --finalists 1 {_CALIBRATED}"
_MORE_SEEDS = f"--seeds 3 --finalists 2 {_CALIBRATED}"
COMPARISONS = {
    "resnet8": f"--data cifar10 --model resnet8 --train-images 20000 --epochs 3 {_LARGE} {_MORE_SEEDS}",
    "resnet20": f"--data cifar10 --model resnet20 --train-images 10000 --epochs 3 {_HIGH} {_SEEDS}",
    "nin": f"--data cifar10 --model nin --width 0.25 --train-images 20000 --epochs 3 {_FEW} {_SEEDS}",
    "plain12": f"--data fashion-mnist --model plain12 --width 0.5 --train-images 20000 --epochs 3 {_FEW} {_MORE_SEEDS}",
    "resnet8-small": f"--data cifar10 --model resnet8 --train-images 4000 --epochs 2 {_SMALL} {_SEEDS} --contenders 4",
}


def run(name: str, out: Path, *, jobs: int, report: bool) -> None:
    """Continue a comparison, or summarise what there is of it, and keep what it gives."""
    folder = out / name
    if report and not (folder / "runs.jsonl").exists():
        return
    rest = ["--summary-only"] if report else [*shlex.split(COMPARISONS[name]), "--jobs", str(jobs)]
    command = [sys.executable, "-m", "normprop", "compare", *rest, "--out", str(folder)]
    print(shlex.join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copyfile(folder / file, RESULTS / name / file)


def section(name: str) -> str:
    """A comparison's command, table, notes and figures, for the page."""
    table = (RESULTS / name / "table.md").read_text().split("\n", 2)[2].strip()
    figures = [f"![{what}](../experiments/results/{name}/{file})" for file, what in SHOWN.items()]
    return "\n\n".join([f"    normprop compare {COMPARISONS[name]}", table, *figures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(COMPARISONS), default=tuple(COMPARISONS))
    parser.add_argument("--out", type=Path, default=Path("runs", "learning"), help="where runs are kept")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    for name in options.only:
        run(name, options.out, jobs=options.jobs, report=options.report)
    shown = [name for name in COMPARISONS if (RESULTS / name).exists()]
    PAGE.write_text(filled(PAGE.read_text(), {name: section(name) for name in shown}))


if __name__ == "__main__":
    main()
