"""The adding problem (Hochreiter & Schmidhuber, 1997): a long memory, learnt with each normaliser of an LSTM.

    python experiments/adding.py                       # goes on where it stopped
    python experiments/adding.py --report              # the table from what was run

A sequence has numbers from [0, 1] and markers on two of them, one in each half; the target is the sum of the two, and its
mean as an answer has a squared error of 1/6. Inputs are standardised, as numbers and markers are distributed. Adam,
gradients no longer than 1, a one-cycle rate, fresh sequences in every update; errors are of 1,000 sequences that all runs
share.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import memory_task
import torch
from torch import Tensor, nn

from normprop.lab.text.character_model import RECURRENT_NORMS, recurrent_norm
from normprop.lab.whole_file import write_whole

RESULTS = Path(__file__).parent / "results" / "recurrent" / "adding.json"
HIDDEN, BATCH, TESTED = 64, 32, 1000


class Adder(nn.Module):
    """An LSTM over `(length, N, 2)` and a linear layer on its last state."""

    def __init__(self, norm: str, gain: float | None, forget_bias: float) -> None:
        super().__init__()
        kind = recurrent_norm(norm)
        self.lstm = kind.layer(2, HIDDEN, forget_bias, (kind.gain or 1.0) if gain is None else gain)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][-1]).squeeze(-1)


def sequences(length: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standardised inputs and targets."""
    value = torch.rand(length, count, generator=generator)
    places = torch.stack([torch.randint(length // 2, (count,), generator=generator) + k * (length // 2) for k in (0, 1)])
    marker = torch.zeros(length, count).scatter_(0, places, 1.0)
    target = (value * marker).sum(0)
    p = 2 / length
    return torch.stack([(value - 0.5) * math.sqrt(12), (marker - p) / math.sqrt(p * (1 - p))], -1), target


@torch.no_grad()
def error(model: Adder, length: int) -> float:
    x, y = sequences(length, TESTED, torch.Generator().manual_seed(10_000))
    return _mistake(model, x, y).item()


def _mistake(model: Adder, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def trained(
    norm: str, *, length: int, lr: float, gain: float | None, forget_bias: float, updates: int, seed: int
) -> dict[str, object]:
    """Errors of one run, ten times while it goes on, and its CPU time."""
    torch.manual_seed(seed)
    model = Adder(norm, gain, forget_bias)
    batch = lambda generator: _mistake(model, *sequences(length, BATCH, generator))
    look = lambda: error(model, length)
    errors, seconds = memory_task.trained(model, batch, look, rate=lr, updates=updates, looks=10, seed=seed + 1)
    return {"errors": errors, "seconds": seconds}


def table(cells: dict[str, dict[str, object]]) -> str:
    """A row for each setting, over its seeds."""
    rows: dict[str, list[dict[str, object]]] = {}
    for cell in cells.values():
        words = " | ".join(str(cell[name]) for name in ("length", "norm", "lr", "gain", "forget_bias", "updates"))
        rows.setdefault(words, []).append(cell)
    lines = ["| length | norm | rate | gain | forget bias | updates | seeds | error at half | error at the end | CPU s |"]
    lines.append("|---|---|---|---|---|---|---|---:|---:|---:|")
    for words, found in rows.items():
        half, end = ([cell["errors"][k] for cell in found] for k in (4, 9))
        seconds = statistics.mean(cell["seconds"] for cell in found)
        lines.append(f"| {words} | {len(found)} | {_several(half)} | {_several(end)} | {seconds:.0f} |")
    return "\n".join(lines)


def _several(values: list[float]) -> str:
    return f"{statistics.median(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norms", nargs="+", choices=RECURRENT_NORMS, default=["normprop", "layer", "weight", "none"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--gain", type=float, help="of normprop and layer; by default that of the normaliser")
    parser.add_argument("--forget-bias", type=float, default=1.0)
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the table of what was run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = json.loads(options.out.read_text()) if options.out.exists() else {}
    for seed in [] if options.report else options.seeds:
        for norm in options.norms:
            setting = {
                "norm": norm,
                "length": options.length,
                "lr": options.lr,
                "gain": options.gain if recurrent_norm(norm).gain else None,
                "forget_bias": options.forget_bias,
                "updates": options.updates,
                "seed": seed,
            }
            key = " ".join(map(str, setting.values()))
            if key not in cells:
                cells[key] = setting | trained(**setting)
                write_whole(options.out, (json.dumps(cells, indent=1) + "\n").encode())
                print(key, cells[key]["errors"], flush=True)
    print(table(cells))


if __name__ == "__main__":
    main()
