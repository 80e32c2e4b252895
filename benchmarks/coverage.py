"""Convert every torchvision and timm network that holds a BatchNorm; write docs/coverage.md.

    python benchmarks/coverage.py            # continues where it was stopped
    python benchmarks/coverage.py --fresh    # from the start
    python benchmarks/coverage.py --only resnet --list

Each batch of networks runs in a process of its own, so that one crash costs one batch's rest and nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
FOREIGN = "## Networks of other libraries\n"  # which foreign.py measures: that part of the page stays
BATCH = 24
TIMEOUT = 1800


def names(pattern: str) -> list[str]:
    import timm
    import torchvision

    vision = torchvision.models.list_models(module=torchvision.models)
    found = [f"torchvision:{n}" for n in vision] + [f"timm:{n}" for n in timm.list_models()]
    return [n for n in found if pattern in n]


def family(name: str) -> str:
    library, _, model = name.partition(":")
    if library == "torchvision":
        return "torchvision"
    from timm.models._registry import _model_to_module

    return f"timm {_model_to_module[model]}"


def in_turns(found: list[str]) -> list[str]:
    """One of each family, then the next of each: a run that is stopped has seen all of them."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in found:
        groups[family(name)].append(name)
    ranked = [(rank, name) for group in groups.values() for rank, name in enumerate(group)]
    return [name for _, name in sorted(ranked, key=lambda pair: pair[0])]


def work(batch: list[str]) -> None:
    """In the subprocess: a line of JSON a network."""
    import torch

    from normprop.lab.coverage import coverage

    torch.set_num_threads(1)
    for name in batch:
        print(json.dumps(coverage([name])[0].to_dict()), flush=True)


def run(batch: list[str]) -> list[dict[str, Any]]:
    """Rows of a batch; a network that kills its process becomes a row that says so."""
    rows: list[dict[str, Any]] = []
    while len(rows) < len(batch):
        rest = batch[len(rows) :]
        command = [sys.executable, __file__, "--work", *rest]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            output, error = done.stdout, (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        except subprocess.TimeoutExpired as expired:
            output, error = (expired.stdout or b"").decode(), f"more than {TIMEOUT} s"
        new = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        rows += new
        if len(new) < len(rest):
            rows.append({"name": rest[len(new)], "norms": 1, "traced": False, "error": error})
    return rows


def page(rows: list[Any]) -> str:
    from importlib.metadata import version

    from normprop.lab.coverage import Coverage, summary

    groups: dict[str, list[Coverage]] = defaultdict(list)
    for row in rows:
        groups[family(row.name)].append(row)
    lines = [
        "# Which networks convert",
        "",
        f"{len(rows)} of the {len(names(''))} classification networks of torchvision and timm are built on the meta device,",
        "without weights, and converted fresh (the rest was not run). *Recorded* means that its forward was recorded,",
        "*converted* that `normprop.convert` gives it sites and that the result runs and returns the right shapes. The last",
        "column names the operations in front of some BatchNorm whose moments are approximate.",
        "",
        f"    python benchmarks/coverage.py    # torch {version('torch')}, torchvision {version('torchvision')}, "
        f"timm {version('timm')}, Python {platform.python_version()}",
        "",
        f"**{summary(rows)}**",
        "",
        "| family | networks | with BatchNorm | recorded | converted | layer sites | affine sites | approximate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, group in sorted(groups.items()):
        held = [r for r in group if r.norms]
        if not held:
            continue
        linear, affine = (sum(getattr(r, k) for r in held) for k in ("after_linear", "affine"))
        kinds = sorted({op for r in held for op in r.approximate})
        counts = (len(group), len(held), sum(r.traced for r in held), sum(r.converted for r in held), linear, affine)
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {', '.join(kinds)} |")
    failed = [r for r in rows if r.norms and not r.converted]
    lines += ["", "## Not converted", "", "| network | recorded | why |", "|---|---|---|"]
    for row in failed:
        reason = (", ".join(row.missing) or row.error).replace("|", "\\|")
        lines.append(f"| {row.name} | {'yes' if row.traced else 'no'} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="*")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--fresh", action="store_true", help="forget what was run before")
    parser.add_argument("--retry", action="store_true", help="run again what was not converted")
    parser.add_argument("--report", action="store_true", help="write the page from what was run")
    parser.add_argument("--list", action="store_true", help="print failures")
    options = parser.parse_args()
    if options.work is not None:
        work(options.work)
        return
    known: dict[str, Any] = {}
    if RESULTS.exists() and not options.fresh:
        known = {row["name"]: row for row in json.loads(RESULTS.read_text())}
    if options.retry:
        known = {n: r for n, r in known.items() if r.get("converted") or not r.get("norms")}
    todo = in_turns([n for n in names(options.only) if n not in known])
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    from normprop.lab.coverage import Coverage, summary

    read = lambda: [
        Coverage(**{k: tuple(v) if isinstance(v, list) else v for k, v in known[n].items()}) for n in sorted(known)
    ]
    for start in range(0, len(todo), BATCH) if not options.report else ():
        known |= {row["name"]: row for row in run(todo[start : start + BATCH])}
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(known[n]) for n in sorted(known)) + "\n]\n")
        print(f"{start + BATCH}/{len(todo)}: {summary(read())}", flush=True)
    rows = read()
    PAGE.parent.mkdir(exist_ok=True)
    _, found, rest = (PAGE.read_text() if PAGE.exists() else "").partition(FOREIGN)
    PAGE.write_text(page(rows) + (f"\n{found}{rest}" if found else ""))
    for row in rows if options.list else []:
        if row.norms and not row.converted:
            print(row.name, row.traced, ", ".join(row.missing) or row.error)
    print(summary(rows))


if __name__ == "__main__":
    main()
