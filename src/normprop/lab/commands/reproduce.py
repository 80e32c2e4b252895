"""`normprop reproduce`."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from normprop.lab.commands.console import advising, console, on_screen
from normprop.lab.commands.grid_progress import checked_jobs, do_missing, resume_advice
from normprop.lab.comparison import records
from normprop.lab.comparison.records import RUNS, Record
from normprop.lab.comparison.workers import work_in_step
from normprop.lab.figures.image import image
from normprop.lab.figures.reproduction_figure import PLOTS
from normprop.lab.pages.marked_page import filled
from normprop.lab.reproduction import account, layers
from normprop.lab.reproduction.experiment_tables import HEADINGS, PARTS, TABLES
from normprop.lab.reproduction.outcome import Found, found, plain
from normprop.lab.reproduction.results_page import SETTING, UNFINISHED, skeleton
from normprop.lab.reproduction.runs import cells, probed, runs
from normprop.lab.reproduction.scale import SCALES, Scale
from normprop.lab.reproduction.speed import measure_speed
from normprop.lab.reproduction.watcher import ProbeSome
from normprop.lab.samples.datasets import load
from normprop.lab.training.recipe import Recipe
from normprop.lab.whole_file import check_folder, write_whole

_SPEED = "speed"
# The findings in hidden layers that belong to each experiment.
_FINDINGS = {
    "fig2": ("incoming", "preactivation"),
    "bound": ("coherence", "bound", "error", "correlation", "deviation"),
}


@dataclass(frozen=True)
class _Job:
    """What the command is to do."""

    parts: tuple[str, ...]
    scale: Scale
    seeds: int
    out: Path
    device: str
    screen: Console

    @property
    def speed_file(self) -> Path:
        """The file for the measured times."""
        return self.out / f"speed-{self.scale.name}.json"

    def runs(self) -> list[Recipe]:
        """All runs."""
        return runs(self.parts, self.scale, self.seeds)


def reproduce(
    parts: Annotated[
        tuple[Literal["fig1", "fig2", "fig3", "fig4", "table1", "speed", "bound", "all"], ...], tyro.conf.Positional
    ] = ("all",),
    *,
    scale: Literal["smoke", "quarter", "full"] = "smoke",
    data_root: Path | None = None,
    seeds: int | None = None,
    out: Path = Path("runs/paper"),
    results: Path | None = None,
    report: Path | None = None,
    jobs: int | None = None,
    device: str = "cpu",
    summary_only: bool = False,
) -> None:
    """Run the paper's experiments with its method, exact moments, BatchNorm and no normaliser; compare with its figures.

    Every run is one line of runs.jsonl; experiments share runs, and the same command goes on after an interruption. Each
    experiment gives a table, a figure and JSON. Under torchrun all processes share every batch. Runs to the end of training
    have options of their own: `normprop reproduce long --help`.

    Args:
        parts: Experiments: fig1 (data normalisation), fig2 (what enters hidden units), fig3 (accuracy per epoch), fig4
            (batch sizes), table1 (test error), speed (time per epoch), bound (Proposition 1), or all.
        scale: smoke takes two minutes on digits, quarter a few hours of two cores on CIFAR-10; full is the paper's own.
        data_root: Where data sets are kept; by default $NORMPROP_DATA or ~/.cache/normprop.
        seeds: Runs of each setting in fig3, fig4 and table1; by default 1 for smoke, 3 otherwise.
        out: Folder for the runs.
        results: Folder for tables, figures and JSON; by default `out`.
        report: Markdown page whose generated blocks are brought up to date; a new one if there is none.
        jobs: Runs at a time, one thread each; by default one per core.
        device: cpu, cuda, cuda:1, mps …
        summary_only: Train and time nothing; write the results of the runs that are finished.
    """
    if data_root:
        os.environ["NORMPROP_DATA"] = str(data_root)  # for the processes that are started, too
    chosen = PARTS if "all" in parts else tuple(part for part in PARTS if part in parts)
    job = _Job(chosen, SCALES[scale], SCALES[scale].with_seeds(seeds), out, device, console())
    writes = int(os.environ.get("RANK", 0)) == 0
    for folder in (out, results or out):
        check_folder(folder)
    with advising(resume_advice(out)):
        if not summary_only:
            _train(job, checked_jobs(jobs))
            if writes and _SPEED in chosen:
                _time(job)
    if writes:
        _summarize(job, results or out, report)


def _train(job: _Job, jobs: int) -> None:
    watch = ProbeSome(probed(job.scale), job.scale.probed)
    world = int(os.environ.get("WORLD_SIZE", 1))
    for data, group in groupby(job.runs(), key=lambda run: run.data):
        recipes, images = list(group), load(data)
        if world > 1:
            left = work_in_step(recipes, job.out, images=images, device=job.device, watch=watch)
            if left and os.environ["RANK"] == "0":
                job.screen.print(f"{len(left)} runs can't share batches among {world} processes: run them in one.")
            continue
        do_missing(recipes, job.out, images=images, jobs=jobs, device=job.device, screen=job.screen, watch=watch)
    if world == 1 and not _missing(job):
        shutil.rmtree(job.out / ".claims", ignore_errors=True)


def _missing(job: _Job) -> set[Recipe]:
    return set(job.runs()) - {record.recipe for record in records.read(job.out / RUNS)}


def _time(job: _Job) -> None:
    if job.speed_file.exists():
        return
    job.screen.print("timing training steps")
    measured = measure_speed(job.scale, load(job.scale.data[0]), job.device)
    write_whole(job.speed_file, json.dumps(measured, indent=1).encode())


def _summarize(job: _Job, results: Path, report: Path | None) -> None:
    """Write and print each experiment's results, and bring the report up to date."""
    runs_found = records.read(job.out / RUNS)
    blocks = {SETTING: account.setting(job.scale, job.runs(), runs_found, _command(job))}
    for part in job.parts:
        text = _write_part(job, part, runs_found, results)
        figure = f"![{HEADINGS[part]}]({_link(results / f'{part}.png', report)})"
        blocks[part] = f"{figure}\n\n{text}" if text else "**Not measured yet.**"
    blocks[UNFINISHED] = account.not_run(job.scale, job.seeds, runs_found, timed=job.speed_file.exists())
    if report:
        page = report.read_text() if report.exists() else skeleton()
        write_whole(report, filled(page, blocks).encode())
    job.screen.print(f"Results in {results}" + (f" and {report}." if report else "."), soft_wrap=True)


def _write_part(job: _Job, part: str, runs_found: Sequence[Record], results: Path) -> str:
    """An experiment as Markdown; empty if it has no results yet."""
    found_here: Any = found(cells(part, job.scale, job.seeds), runs_found)
    if part == _SPEED:
        if not job.speed_file.exists():
            return ""
        found_here = json.loads(job.speed_file.read_bytes())
    elif not any(found_here.values()):
        return ""
    table = TABLES[part](found_here, job.scale)
    left = account.progress(part, job.scale, job.seeds, runs_found)
    title = f"{HEADINGS[part]} — scale {job.scale.name}"
    text = table.markdown() + (f"\n\n{left}" if left else "")
    values = {"measured": found_here} if part == _SPEED else {"runs": plain(found_here), **_findings(part, found_here)}
    about = {
        "title": title,
        "scale": job.scale.name,
        "heads": table.columns,
        "rows": table.rows,
        "reading": table.note,
    }
    write_whole(results / f"{part}.json", json.dumps(about | values, indent=1, allow_nan=False).encode())
    write_whole(results / f"{part}.png", image(PLOTS[part](found_here, title)))
    write_whole(results / f"{part}.md", f"# {title}\n\n![{HEADINGS[part]}]({part}.png)\n\n{text}\n".encode())
    job.screen.print(on_screen(dataclasses.replace(table, title=title)))
    if left:
        job.screen.print(left.strip("*"))
    return text


def _findings(part: str, found_here: Found) -> dict[str, Any]:
    names = _FINDINGS.get(part)
    if names is None:
        return {}
    watched = {key[0]: found_runs[0] for key, found_runs in found_here.items() if found_runs}
    return {"findings": {name: layers.plain(record, *names) for name, record in watched.items()}}


def _link(file: Path, report: Path | None) -> str:
    return os.path.relpath(file, report.parent).replace(os.sep, "/") if report else file.name


def _command(job: _Job) -> str:
    return shlex.join(["normprop", "reproduce", "all", "--scale", job.scale.name, "--seeds", str(job.seeds)])
