"""The copying problem (Hochreiter & Schmidhuber, 1997; Arjovsky et al., 2016): symbols to be told after a long pause.

    python experiments/copying.py                      # goes on where it stopped
    python experiments/copying.py --report             # the table from what was run

A sequence has --symbols of eight kinds, a pause of --length blanks, and a mark; from the mark on, the symbols are to be
told in their order, while the input is blank. The loss is that of these answers alone, 3 bits each without a memory.
Adam, gradients no longer than 1, a one-cycle rate, fresh sequences in every update; bits are of 1,000 sequences that all
runs share. Every normaliser has the same rates and forget biases. Seconds are CPU time on one thread.
"""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path

import memory_task
import torch
from runs_file import Run, once, parser, read
from torch import Tensor, nn

import normprop
from normprop.lab.text.character_model import RECURRENT_NORMS, recurrent_norm

RESULTS = Path(__file__).parent / "results" / "recurrent" / "copying.jsonl"
KINDS, HIDDEN, BATCH, TESTED = 8, 64, 32, 1000
KEYS = ("norm", "rate", "forget_bias", "length", "symbols", "updates", "seed")


class Copier(nn.Module):
    """An LSTM over symbols `(length, N)` and scores of what to tell at the last steps."""

    def __init__(self, norm: str, forget_bias: float) -> None:
        super().__init__()
        kind = recurrent_norm(norm)
        self.codes = normprop.nn.OrthogonalEmbedding(KINDS + 2)
        self.lstm = kind.layer(KINDS + 2, HIDDEN, forget_bias, kind.gain or 1.0)
        self.head = nn.Linear(HIDDEN, KINDS)

    def forward(self, x: Tensor, told: int) -> Tensor:
        return self.head(self.lstm(self.codes(x))[0][-told:])


def sequences(symbols: int, length: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs, and the symbols to be told at the end; 8 is a blank and 9 the mark."""
    told = torch.randint(KINDS, (symbols, count), generator=generator)
    x = torch.full((symbols + length + symbols, count), KINDS)
    x[:symbols], x[symbols + length] = told, KINDS + 1
    return x, told


def loss(model: Copier, x: Tensor, told: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x, len(told)).flatten(0, 1), told.flatten())


def trained(norm: str, rate: float, forget_bias: float, length: int, symbols: int, updates: int, seed: int) -> Run:
    """Bits an answer at eight times of one run, and its CPU time."""
    torch.manual_seed(seed)
    model = Copier(norm, forget_bias)
    tested = sequences(symbols, length, TESTED, torch.Generator().manual_seed(10_000))
    batch = lambda generator: loss(model, *sequences(symbols, length, BATCH, generator))
    look = torch.no_grad()(lambda: loss(model, *tested).item() / math.log(2))
    bits, seconds = memory_task.trained(model, batch, look, rate=rate, updates=updates, looks=8, seed=seed + 1)
    values = (norm, rate, forget_bias, length, symbols, updates, seed)
    return dict(zip(KEYS, values, strict=True)) | {"bits": bits, "seconds": seconds}


def table(runs: list[Run]) -> str:
    """A row for each setting, over its seeds."""
    lines = ["| norm | rate | forget bias | pause | symbols | updates | bits at half | bits at the end | CPU s |"]
    lines.append("|---|---|---|---|---|---|---|---|---:|")
    key = lambda run: tuple(run[name] for name in KEYS[:-1])
    for words, found in itertools.groupby(sorted(runs, key=key), key):
        cells = list(found)
        half, end = (", ".join(f"{run['bits'][k]:.3f}" for run in cells) for k in (3, 7))
        seconds = statistics.mean(run["seconds"] for run in cells)
        lines.append(f"| {' | '.join(map(str, words))} | {half} | {end} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, RESULTS, seeds=3)
    options.add_argument("--norms", nargs="+", choices=RECURRENT_NORMS, default=["normprop", "layer", "weight", "none"])
    options.add_argument("--rates", nargs="+", type=float, default=[1e-2])
    options.add_argument("--forget-biases", nargs="+", type=float, default=[1.0])
    options.add_argument("--length", type=int, default=200, help="of the pause")
    options.add_argument("--symbols", type=int, default=3)
    options.add_argument("--updates", type=int, default=800)
    given = options.parse_args()
    torch.set_num_threads(1)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    runs = read(given.out)
    cells = itertools.product(range(given.seeds), given.rates, given.forget_biases, given.norms)
    for seed, rate, forget_bias, norm in [] if given.report else cells:
        what = (norm, rate, forget_bias, given.length, given.symbols, given.updates, seed)
        once(given.out, runs, KEYS, what, lambda what=what: trained(*what))
    print(table(runs))


if __name__ == "__main__":
    main()
