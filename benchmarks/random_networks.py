"""Draw networks at random and try what conversion promises, many more than the suite does.

    python benchmarks/random_networks.py 0 10000    # numbers of the draws; continues where it was stopped

Counts go to benchmarks/results/random.json, a row for every hundred draws, with the numbers of what was wrong and how. A
draw that fails goes into `FOUND` of tests/test_random_networks.py.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "random.json"
CHUNK = 100
SECONDS = 120  # of processor time: what takes longer hangs

sys.path.insert(0, str(ROOT))


def attempt(seed: int) -> tuple[str, str]:
    """What became of a draw; what was wrong with it, and where."""
    from tests.random_networks import check, draw

    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return check(draw(seed)), ""
    except Exception as error:  # whatever is raised is what this looks for
        where = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__][-1]
        message = (str(error).splitlines() or [""])[0][:120]
        return "wrong", f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def chunk(first: int) -> dict[str, Any]:
    """The counts of a hundred draws, and the faults among them."""
    counts: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    for seed in range(first, first + CHUNK):
        outcome, fault = attempt(seed)
        counts[outcome] += 1
        if fault:
            wrong[str(seed)] = fault
            print(seed, fault, flush=True)
    return {"first": first, "counts": dict(counts), "wrong": wrong}


def _hung(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main(first: int, end: int) -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _hung)
    rows = {row["first"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for start in range(first, end, CHUNK):
        if start in rows:
            continue
        rows[start] = chunk(start)
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(rows[n]) for n in sorted(rows)) + "\n]\n")
        print(start + CHUNK, rows[start]["counts"], flush=True)
    total: Counter[str] = Counter()
    for row in rows.values():
        total.update(row["counts"])
    print(f"{CHUNK * len(rows)} draws:", dict(total))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
