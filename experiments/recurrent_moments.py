"""Long runs of recurrent layers with random weights on white noise: moments of states beside those predicted.

    python experiments/recurrent_moments.py

writes experiments/results/recurrent/moments.json and prints a table for docs/recurrent.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from normprop import nn
from normprop.lab.whole_file import write_whole

RESULTS = Path(__file__).parent / "results" / "recurrent" / "moments.json"
SEEDS = (0, 1, 2)
LAYERS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
# Name of the layer, gains of input and state, other options.
CASES = [
    ("RNN", 1.0, 1.0, {}),
    ("RNN", 1.0, 1.0, {"nonlinearity": "relu"}),
    ("LSTM", 1.5, 0.05, {}),
    ("LSTM", 1.0, 1.0, {}),
    ("LSTM", 2.0, 2.0, {}),
    ("LSTM", 1.0, 1.0, {"forget_bias": 1.0}),
    ("LSTM", 1.0, 1.0, {"forget_bias": 2.0}),
    ("LSTM", 1.0, 1.0, {"gain_cell_init": None}),
    ("GRU", 1.5, 0.05, {}),
    ("GRU", 1.0, 1.0, {}),
    ("GRU", 2.0, 2.0, {}),
    ("GRU", 1.0, 1.0, {"update_bias": 1.0}),
]


@torch.no_grad()
def measured(kind: str, gain_ih: float, gain_hh: float, options: dict[str, object], seed: int, steps: int) -> list[float]:
    """Mean and std of h over the second half of a run, and the std of an LSTM's cell over that predicted, else NaN."""
    torch.manual_seed(seed)
    layer = LAYERS[kind](64, 512, gain_ih_init=gain_ih, gain_hh_init=gain_hh, **options)
    x = torch.randn(steps, 32, 64)
    _, state = layer(x[: steps // 2])
    output, state = layer(x[steps // 2 :], state)
    predicted = layer.state_moments().cell_std
    cell = float("nan") if predicted is None else state[1].std().item() / predicted.item()
    return [output.mean().item(), output.std().item(), cell]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    rows = []
    for kind, gain_ih, gain_hh, options in CASES:
        runs = [measured(kind, gain_ih, gain_hh, options, seed, steps) for seed in SEEDS]
        mean, std, cell = zip(*runs, strict=True)
        found = {"kind": kind, "gain_ih": gain_ih, "gain_hh": gain_hh, **options, "mean": mean, "std": std}
        rows.append(found | ({"cell": cell} if kind == "LSTM" else {}))
        words = ", ".join(f"{name}={value}" for name, value in options.items()) or "–"
        ratio = f"{statistics.mean(cell):.3f}" if kind == "LSTM" else "–"
        spread = (max(std) - min(std)) / 2
        numbers = f"{statistics.mean(mean):+.3f} | {statistics.mean(std):.3f} ± {spread:.3f} | {ratio}"
        print(f"| {kind} | {gain_ih:g}, {gain_hh:g} | {words} | {numbers} |", flush=True)
    report = {"torch": torch.__version__, "steps": steps, "seeds": SEEDS, "rows": rows}
    write_whole(RESULTS, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
