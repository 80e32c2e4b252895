"""Draw networks at random and try what conversion promises, many more than the suite does.

    python benchmarks/random_networks.py 0 10000    # numbers of the draws; prints what was wrong

A draw that fails goes into `FOUND` of tests/test_random_networks.py.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(first: int, end: int) -> None:
    from tests.random_networks import check, draw

    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    wrong: dict[str, list[int]] = defaultdict(list)
    for seed in range(first, end):
        try:
            counts[check(draw(seed))] += 1
        except Exception as error:  # whatever is raised is what this looks for
            counts["wrong"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = (str(error).splitlines() or [""])[0][:120]
            wrong[f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"].append(seed)
        if seed % 100 == 99:
            print(seed + 1, dict(counts), flush=True)
    print(dict(counts))
    for reason, seeds in sorted(wrong.items(), key=lambda pair: -len(pair[1])):
        print(len(seeds), reason, seeds[:6])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
