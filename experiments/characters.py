"""Character LSTMs with four normalisers on Shakespeare: rates by validation on one seed, then three seeds each.

    python experiments/characters.py                   # goes on where it stopped
    python experiments/characters.py --report          # the tables from what was run

The text is `shakespeare.txt` in $NORMPROP_DATA, or what --data names. All have one layer, of --hidden units, 32 streams,
windows of 100 characters, Adam with a one-cycle rate and gradients no longer than 1; forget biases start at 0. `--extra`
runs what else was tried. Seconds are CPU time of the whole run on one thread, with its evaluations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from normprop.lab.text.corpus import Corpus, read
from normprop.lab.text.text_recipe import TextRecipe
from normprop.lab.text.text_training import train_text
from normprop.lab.whole_file import write_whole

RESULTS = Path(__file__).parent / "results" / "recurrent" / "characters.json"
RATES = (1e-2, 2e-2, 4e-2)
SEEDS = (0, 1, 2)
# Normaliser and gain.
CONTENDERS = (("normprop", 1.0), ("normprop-follow", 1.0), ("layer", 1.0), ("none", None), ("weight", None))
Cell = dict[str, Any]


def cell(recipe: TextRecipe, corpus: Corpus, cells: dict[str, Cell]) -> Cell:
    """What a run gave, from `cells` if it is there."""
    recipe = recipe.resolved()
    names = ("norm", "gain", "forget_bias", "lr", "hidden", "updates", "seed")
    setting = {name: getattr(recipe, name) for name in names}
    key = " ".join(map(str, setting.values()))
    if key not in cells:
        began = time.process_time()
        run = train_text(recipe, corpus=corpus, device="cpu", sample=300, reports=2)
        seconds = time.process_time() - began
        rows = [[row.update, row.train_bits, row.validation_bits] for row in run.rows]
        cells[key] = setting | {"rows": rows, "test_bits": run.test_bits, "seconds": seconds, "sample": run.sample}
    return cells[key]


def validation(found: Cell) -> float:
    """Bits at the end; without an end infinitely many."""
    bits = found["rows"][-1][2]
    return float("inf") if bits is None else bits


def table(cells: dict[str, Cell]) -> str:
    """A row for each setting, over its seeds."""
    rows: dict[str, list[Cell]] = {}
    for found in cells.values():
        words = " | ".join(str(found[name]) for name in ("norm", "gain", "forget_bias", "lr", "hidden", "updates"))
        rows.setdefault(words, []).append(found)
    lines = ["| norm | gain | forget bias | rate | hidden | updates | seeds | validation | test | CPU s |"]
    lines.append("|---|---|---|---|---|---|---|---:|---:|---:|")
    for words, found in rows.items():
        parts = [_several([validation(one) for one in found]), _several([one["test_bits"] or float("inf") for one in found])]
        seconds = statistics.mean(one["seconds"] for one in found)
        lines.append(f"| {words} | {len(found)} | {' | '.join(parts)} | {seconds:.0f} |")
    return "\n".join(lines)


def _several(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="shakespeare")
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--norms", nargs="+", help="some of the normalisers, all by default")
    parser.add_argument("--extra", nargs="*", default=[], help="norm,gain,forget_bias,rate of further runs, '-' for none")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the tables of what was run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = json.loads(options.out.read_text()) if options.out.exists() else {}
    if not options.report:
        corpus = read(options.data)
        base = TextRecipe(data=options.data, hidden=options.hidden, updates=options.updates)

        def run(**changes: Any) -> Cell:
            found = cell(dataclasses.replace(base, **changes), corpus, cells)
            write_whole(options.out, (json.dumps(cells, indent=1) + "\n").encode())
            print({k: v for k, v in found.items() if k not in ("rows", "sample")}, validation(found), flush=True)
            return found

        if options.extra:
            for words in options.extra:
                norm, *numbers = words.split(",")
                gain, forget_bias, lr = (None if number == "-" else float(number) for number in numbers)
                for seed in SEEDS:
                    run(norm=norm, gain=gain, forget_bias=forget_bias or 0.0, lr=lr, seed=seed)
        else:
            contenders = [(n, g) for n, g in CONTENDERS if n in (options.norms or [n])]
            tried = {n: [run(norm=n, gain=g, lr=lr) for lr in options.rates] for n, g in contenders}
            for seed in SEEDS[1:]:
                for norm, gain in contenders:
                    run(norm=norm, gain=gain, lr=min(tried[norm], key=validation)["lr"], seed=seed)
    print(table(cells))


if __name__ == "__main__":
    main()
