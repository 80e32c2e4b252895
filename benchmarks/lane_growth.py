"""How the moment lane's cost grows with depth and with the number of weights, beside one reading of the weights.

    python benchmarks/lane_growth.py            # all sizes, about three minutes
    python benchmarks/lane_growth.py --report   # the table of what was run

Plain stacks of 3×3 convolutions with BatchNorm and ReLU are converted; the lane alone runs forward and backward.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normprop
from normprop.lab.cost.allocator import keep_freed_memory
from normprop.lab.cost.lane_alone import LaneAlone, lane_step, reading_step
from normprop.lab.cost.machine import Machine
from normprop.lab.cost.quartiles import Quartiles
from normprop.lab.cost.rounds import measure
from normprop.lab.pages.text_table import Table

RESULTS = Path(__file__).resolve().parent / "results" / "lane_growth.json"
DEPTHS = (4, 16, 64)
PARAMETERS = (1e4, 1e5, 1e6, 1e7, 1e8)
LANE, READING = "lane", "reading"


def stack(depth: int, width: int) -> nn.Module:
    """`depth` convolutions, the first of which reads as many channels as all write."""
    layers = [(nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*(module for layer in layers for module in layer))


def run(depth: int, parameters: float, seconds: float, compiled: bool) -> dict[str, Any]:
    """Times of one lane and of one reading, in turns."""
    width = max(2, round((parameters / (9 * depth)) ** 0.5))
    size = 2 * depth + 1  # what is left of it is one position
    model = normprop.convert(stack(depth, width), normprop.InputStats.standard(width, size, size))
    lane = LaneAlone(model)
    rounds = measure({LANE: lane_step(lane, compiled=compiled), READING: reading_step(lane)}, seconds=seconds)
    return {
        "depth": depth,
        "width": width,
        "weights": 9 * depth * width**2,
        "rounds": len(rounds),
        "lane": asdict(rounds.seconds(LANE, "cpu")),
        "reading": asdict(rounds.seconds(READING, "cpu")),
        "ratio": asdict(rounds.ratio(LANE, READING, "cpu")),
    }


def fitted(rows: list[dict[str, Any]], kind: str) -> tuple[float, float, float]:
    """a and b of t = a·layers + b·weights, least squares of the relative error; and its largest size."""
    times = torch.tensor([row[kind]["median"] for row in rows], dtype=torch.float64)
    terms = torch.tensor([[row["depth"], row["weights"]] for row in rows], dtype=torch.float64) / times[:, None]
    solution = torch.linalg.lstsq(terms, torch.ones(len(rows), 1, dtype=torch.float64)).solution
    worst = (terms @ solution - 1).abs().max()
    return float(solution[0]), float(solution[1]), float(worst)


def growth_table(rows: list[dict[str, Any]]) -> Table:
    """What was measured, and the law beside it."""
    a, b, _ = fitted(rows, LANE)
    body = []
    for row in rows:
        lane = Quartiles(*(1e3 * row["lane"][q] for q in ("low", "median", "high")))
        law = 1e3 * (a * row["depth"] + b * row["weights"])
        ratio = Quartiles(**row["ratio"])
        body.append((f"{row['weights']:,}", str(row["depth"]), str(row["width"]), str(lane), f"{law:.3g}", str(ratio)))
    columns = ("weights", "layers", "channels", "lane, ms", "law, ms", "lane over one reading")
    return Table(columns, body, "The moment lane alone, forward and backward", words=())


def law(rows: list[dict[str, Any]]) -> str:
    """The fitted law in words."""
    (a, b, worst), (c, d, off) = fitted(rows, LANE), fitted(rows, READING)
    return (
        f"Lane: {1e6 * a:.0f} µs a layer + {1e9 * b:.2f} ns a weight (off by {100 * worst:.0f} % at most). "
        f"One reading: {1e6 * c:.1f} µs a layer + {1e9 * d:.2f} ns a weight (off by {100 * off:.0f} % at most). "
        f"For a large network the lane takes {b / d:.1f} readings of its weights."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each size; five rounds are run at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--most", type=float, default=max(PARAMETERS), help="weights of the largest network")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print what was run")
    options = parser.parse_args()
    if not options.report:
        torch.set_num_threads(options.threads)
        keep_freed_memory()
        machine = asdict(Machine.this())
        rows = []
        for parameters in (p for p in PARAMETERS if p <= options.most):
            for depth in DEPTHS:
                rows.append(run(depth, parameters, options.seconds, options.compile))
                print(json.dumps(rows[-1]), flush=True)
        command = f"python benchmarks/lane_growth.py --seconds {options.seconds:g} --threads {options.threads}"
        result = {"command": command + " --compile" * options.compile, "machine": machine, "rows": rows}
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(options.out.read_text())
    rows, machine = result["rows"], result["machine"]
    place = f"{machine['processor']}, {machine['system']}, torch {machine['torch']}, load {machine['load']} before."
    print(f"    {result['command']}", place, growth_table(rows).markdown(), law(rows), sep="\n\n")


if __name__ == "__main__":
    main()
