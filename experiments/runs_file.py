"""The runs of an experiment in a file, a line each: what is there isn't done again."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]


def read(path: Path) -> list[Run]:
    """The runs of a file, none if it isn't there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def once(path: Path, runs: list[Run], keys: Sequence[str], what: tuple[Any, ...], train: Callable[[], Run]) -> None:
    """Do a run that isn't among `runs` by what its keys hold, and write it down."""
    if any(tuple(run[k] for k in keys) == what for run in runs):
        return
    runs.append(train())
    with path.open("a") as file:
        file.write(json.dumps(runs[-1]) + "\n")
    print(runs[-1], flush=True)


def study(
    path: Path,
    runs: list[Run],
    keys: Sequence[str],
    cells: Iterable[tuple[Any, ...]],
    settings: Sequence[tuple[float, float]],
    seeds: int,
    train: Callable[[tuple[Any, ...]], Run],
) -> None:
    """Do what a study lacks: every cell with all settings and the first seed, then with its best one and the other seeds.

    Args:
        path: of the runs.
        runs: that are there; those that are done are added.
        keys: what tells a run from others: the cell's, then rate, clip and seed.
        cells: values of the cell's keys.
        settings: rates and clippings.
        seeds: how many.
        train: does one run, by the values of its keys.
    """
    cells = list(cells)
    path.parent.mkdir(parents=True, exist_ok=True)

    def do(*what: Any) -> None:
        once(path, runs, keys, what, lambda: train(what))

    for setting, cell in itertools.product(settings, cells):
        do(*cell, *setting, 0)
    for seed, cell in itertools.product(range(1, seeds), cells):
        best = chosen(runs, **dict(zip(keys, cell, strict=False)))
        if best is not None:
            do(*cell, best["rate"], best["clip"], seed)


def table(
    runs: list[Run],
    keys: Sequence[str],
    settings: Sequence[tuple[float, float]],
    heading: str,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
) -> str:
    """Markdown: test results of the chosen rate and clipping over seeds, and the first seed's of all.

    Args:
        runs: of a `study`.
        keys: see there, and for settings.
        settings: a column each.
        heading: of the columns before these, the test results' last.
        rows: what stands before a cell's results, and the values of its keys; those without runs are left out.
    """
    names = " | ".join(f"{rate:g}, {clip or '–'}" for rate, clip in settings)
    before = " --- |" * heading.count("|")
    lines = [f"| {heading} | rate, clip | {names} |", f"|{before} ---: | --- |{' ---: |' * len(settings)}"]
    for words, cell in rows:
        best = chosen(runs, **cell)
        if best is not None:
            firsts = (first_seed(runs, **cell, rate=rate, clip=clip) for rate, clip in settings)
            found = f"{over_seeds(runs, best, keys)} | {best['rate']:g}, {best['clip'] or '–'} | {' | '.join(firsts)}"
            lines.append(f"| {words} | {found} |")
    return "\n".join(lines)


def parser(description: str | None, out: Path, seeds: int) -> argparse.ArgumentParser:
    """With the options that all studies have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, default=out)
    found.add_argument("--seeds", type=int, default=seeds)
    found.add_argument("--report", action="store_true")
    return found


def chosen(runs: list[Run], **what: Any) -> Run | None:
    """Of the first seed's runs with these values the one that is best on validation data; None if there is none."""
    mine = [run for run in runs if run["seed"] == 0 and all(run[k] == v for k, v in what.items())]
    return max(mine, key=lambda run: run["validation"], default=None)


def over_seeds(runs: list[Run], like: Run, keys: Sequence[str]) -> str:
    """Mean ± standard deviation of the test results of all seeds of a run."""
    found = [run["test"] for run in runs if all(run[k] == like[k] for k in keys if k != "seed")]
    return f"{statistics.mean(found):.1f}" + (f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else "")


def first_seed(runs: list[Run], **what: Any) -> str:
    """The first seed's test result with these values, a dash if it wasn't run."""
    found = [run["test"] for run in runs if run["seed"] == 0 and all(run[k] == v for k, v in what.items())]
    return f"{found[0]:.1f}" if found else "–"
