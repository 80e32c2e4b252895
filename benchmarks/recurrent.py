"""CPU time of a training step of recurrent layers beside the same loops without normalisation, LayerNorm's and torch's own.

    python benchmarks/recurrent.py                 # one thread, a few minutes
    python benchmarks/recurrent.py --rounds 40

A step is forward, backward and Adam's update, at hidden size 512, 100 times, batch 32, inputs of 84 features. The layers
take turns; tables show medians, and medians with quartiles of ratios within a turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import normprop
from normprop.lab.cost.machine import Machine
from normprop.lab.cost.quartiles import Quartiles
from normprop.lab.text.layer_norm_lstm import LayerNormLSTM
from normprop.lab.text.plain_lstm import PlainLSTM
from normprop.lab.whole_file import write_whole
from normprop.nn.recurrent_block import Block, elman_step, gru_step
from normprop.nn.unrolling import unroll

RESULTS = Path(__file__).parent / "results" / "recurrent.json"
INPUT = 84


class PlainLoop(nn.Module):
    """A GRU or an RNN without normalisation, with the loop of ours."""

    def __init__(self, kind: str, hidden: int) -> None:
        super().__init__()
        module = {"GRU": nn.GRU, "RNN": nn.RNN}[kind](INPUT, hidden)
        self.kind, self.weights = kind, nn.ParameterList(module.parameters())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        block = Block(*self.weights)
        gated = self.kind == "GRU"
        step = gru_step if gated else (lambda *parts: elman_step("tanh", *parts))
        start = x.new_zeros(x.shape[1], block.weight_hh.shape[1])
        outputs, (last,) = unroll(step, block.drive(x, both=not gated).unbind(0), (start,), block)
        return torch.stack(outputs), last


def weight_normed(hidden: int) -> nn.Module:
    layer = PlainLSTM(INPUT, hidden)
    for name in ("weight_ih", "weight_hh"):
        weight_norm(layer, name)
    return layer


# The loop that the others of a family are compared with comes first.
FAMILIES: dict[str, dict[str, Callable[[int], nn.Module]]] = {
    "LSTM": {
        "no normalisation, same loop": lambda hidden: PlainLSTM(INPUT, hidden),
        "normprop": lambda hidden: normprop.nn.LSTM(INPUT, hidden),
        "normprop, without cell gains": lambda hidden: normprop.nn.LSTM(INPUT, hidden, gain_cell_init=None),
        "normprop, variances follow": lambda hidden: normprop.nn.LSTM(INPUT, hidden, variances="follow"),
        "weight norm": weight_normed,
        "LayerNorm, loop written likewise": lambda hidden: LayerNormLSTM(INPUT, hidden),
        "torch.nn.LSTM": lambda hidden: nn.LSTM(INPUT, hidden),
    },
    "GRU": {
        "no normalisation, same loop": lambda hidden: PlainLoop("GRU", hidden),
        "normprop": lambda hidden: normprop.nn.GRU(INPUT, hidden),
        "torch.nn.GRU": lambda hidden: nn.GRU(INPUT, hidden),
    },
    "RNN": {
        "no normalisation, same loop": lambda hidden: PlainLoop("RNN", hidden),
        "normprop": lambda hidden: normprop.nn.RNN(INPUT, hidden),
        "torch.nn.RNN": lambda hidden: nn.RNN(INPUT, hidden),
    },
}


def stepper(layer: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x)[0], target).backward()
        optimizer.step()

    return step


def measure(family: str, *, hidden: int, times: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time of every layer in every round."""
    torch.manual_seed(0)
    x, target = torch.randn(times, batch, INPUT), torch.randn(times, batch, hidden)
    steps = {name: stepper(make(hidden), x, target) for name, make in FAMILIES[family].items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if turn >= 2:  # the first ones allocate
                found[name].append(time.process_time() - began)
    return found


def table(family: str, found: dict[str, list[float]]) -> str:
    lines = [f"| {family} | ms | over the same loop without | over LayerNorm's |", "|---|---:|---:|---:|"]
    plain, layer = (found.get(name) for name in ("no normalisation, same loop", "LayerNorm, loop written likewise"))
    for name, seconds in found.items():
        ratios = [
            "–"
            if other is None or other is seconds
            else str(Quartiles.of([a / b for a, b in zip(seconds, other, strict=True)]))
            for other in (plain, layer)
        ]
        lines.append(f"| {name} | {1e3 * statistics.median(seconds):.0f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"hidden": options.hidden, "times": options.times, "batch": options.batch}
    report = {"machine": dataclasses.asdict(Machine.this()), **sizes, "seconds": {}}
    for family in options.families:
        report["seconds"][family] = measure(family, rounds=options.rounds, **sizes)
        print(table(family, report["seconds"][family]), flush=True)
        write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
