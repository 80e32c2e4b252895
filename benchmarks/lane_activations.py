"""CPU time of a moment lane's activations, forward and backward on one thread, beside that of the general path.

    python benchmarks/lane_activations.py

The general path is `activation_moments`, or quadrature of mean and variance for what is written out; it is what exported
lanes run. The two take turns; the table shows the medians, and the median and quartiles of the ratio within a turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from normprop import Moments
from normprop.activations.activation_moments import activation_moments, mean_and_var
from normprop.rules.composed import Program, composed, find_bends, run
from normprop.rules.elementwise import named_activation

RESULTS = Path(__file__).parent / "results" / "lane_activations.json"
NAMES = ("silu", "gelu", "mish", "elu", "sigmoid", "tanh", "hardswish", "relu6", "hardsigmoid")
PROGRAMS: dict[str, Program] = {
    "x * sigmoid(x)": (("sigmoid", ("%0",), ()), ("mul", ("%0", "%1"), ())),
    "x * relu6(x + 3) / 6": (
        ("add", ("%0", 3.0), ()),
        ("relu6", ("%1",), ()),
        ("mul", ("%0", "%2"), ()),
        ("div", ("%3", 6.0), ()),
    ),
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    torch.set_num_threads(1)
    rows = [
        {"activation": name, "channels": channels, "dtype": str(dtype).removeprefix("torch."), **times}
        for name, full, lane in contenders()
        for channels in given.channels
        for dtype in (torch.float32, torch.float64)
        for times in [measured(full, lane, channels, dtype, given.rounds)]
    ]
    show(rows)
    machine = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps({**machine, "rounds": given.rounds, "seed": given.seed, "rows": rows}, indent=1) + "\n")


Rule = Callable[[Moments], tuple[Tensor, Tensor]]


def contenders() -> list[tuple[str, Rule, Rule]]:
    """Name, general path, the lane's."""
    found: list[tuple[str, Rule, Rule]] = []
    for name in NAMES:
        found.append((name, named_full(name), named_lane(name)))
    for name, program in PROGRAMS.items():
        found.append((name, *composed_pair(program)))
    return found


def named_full(name: str) -> Rule:
    """`activation_moments`."""

    def run(x: Moments) -> tuple[Tensor, Tensor]:
        result = activation_moments(name, x.mean, x.std)
        return result.mean, result.var

    return run


def named_lane(name: str) -> Rule:
    """The rule that lanes run."""

    def run(x: Moments) -> tuple[Tensor, Tensor]:
        result = named_activation(name, (), x)
        return result.mean, result.var

    return run


def composed_pair(program: Program) -> tuple[Rule, Rule]:
    """Both for a function written out in tensor arithmetic."""
    bends = find_bends(program)
    assert bends is not None
    edges, jumps = bends

    points = sorted({0.0, *(sign * 2.0**k for k in range(-2, 7) for sign in (-1, 1)), *edges})

    def full(x: Moments) -> tuple[Tensor, Tensor]:
        return mean_and_var(lambda u: run(program, u, ()), x.mean, x.var, points)

    def lane(x: Moments) -> tuple[Tensor, Tensor]:
        result = composed(x, program, edges, jumps)
        return result.mean, result.var

    return full, lane


def measured(full: Rule, lane: Rule, channels: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Milliseconds of both and the ratio."""
    mean = torch.randn(1, channels, 1, 1, dtype=dtype).requires_grad_()
    var = torch.empty(1, channels, 1, 1, dtype=dtype).uniform_(0.3, 2.0).requires_grad_()
    times = []
    for _ in range(rounds + 3):
        times.append([timed(rule, mean, var) for rule in (full, lane)])
    pairs = torch.tensor(times[3:], dtype=torch.float64) * 1e3
    ratio = pairs[:, 0] / pairs[:, 1]
    low, middle, high = (float(ratio.quantile(q)) for q in (0.25, 0.5, 0.75))
    general, alone = pairs.median(0).values.tolist()
    return {"general_ms": general, "lane_ms": alone, "ratio": middle, "ratio_low": low, "ratio_high": high}


def timed(rule: Rule, mean: Tensor, var: Tensor) -> float:
    """CPU seconds of one forward and backward."""
    start = time.process_time()
    first, second = rule(Moments(mean, var))
    torch.autograd.grad((first + second).sum(), (mean, var))
    return time.process_time() - start


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title="moment lane: forward and backward, CPU ms, one thread")
    for heading in ("activation", "channels", "dtype", "general", "lane", "ratio (quartiles)"):
        table.add_column(heading, justify="left" if heading in ("activation", "dtype") else "right")
    for r in rows:
        ratio = "{ratio:.1f} ({ratio_low:.1f} to {ratio_high:.1f})".format(**r)
        table.add_row(
            str(r["activation"]), str(r["channels"]), str(r["dtype"]), f"{r['general_ms']:.2f}", f"{r['lane_ms']:.2f}", ratio
        )
    Console().print(table)


if __name__ == "__main__":
    main()
