"""What a step of private training costs: clipping by Opacus' hooks, the same network with four normalisations.

    python benchmarks/private_step.py            # all, a few minutes
    python benchmarks/private_step.py --report   # the table of what was run

A step is zero_grad, forward, backward with the gradient of each sample, clipping, noise, SGD. Steps are timed in turns, as
CPU time, on one thread.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from normprop.integrations.opacus import PrivateNetwork, WholeNetwork
from normprop.lab.cost.allocator import keep_freed_memory
from normprop.lab.cost.contenders import CONTENDERS
from normprop.lab.cost.machine import Machine
from normprop.lab.cost.quartiles import Quartiles
from normprop.lab.cost.rounds import measure
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer
from normprop.lab.pages.text_table import Table

RESULTS = Path(__file__).resolve().parent / "results" / "private_step.json"
SHAPES = {"resnet20": (3, 32, 32), "fashion": (1, 28, 28)}
GROUP, NONE, EFFECTIVE, WHOLE = "GroupNorm", "no normaliser", "PrivateNetwork", "WholeNetwork"


def network(name: str) -> nn.Module:
    """ResNet-20, or three convolutions for images of clothing, with BatchNorm."""
    if name == "resnet20":
        return build(name, shape=SHAPES[name], classes=10, norm=normalizer("batch"))
    layers: list[nn.Module] = []
    for inside, outside in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 10))


def private(name: str, way: str, batch: int) -> Callable[[], None]:
    """One step of a network in one of four ways."""
    torch.manual_seed(0)
    shape, base = SHAPES[name], network(name)
    model = CONTENDERS[{GROUP: "group", NONE: "plain"}.get(way, "normprop")].build(base, shape).train()
    module: nn.Module = {EFFECTIVE: PrivateNetwork, WHOLE: WholeNetwork}.get(way, lambda model: model)(model)
    if isinstance(module, PrivateNetwork):
        optimizer: torch.optim.Optimizer = module.optimizer(torch.optim.SGD(model.parameters(), lr=1e-3))
    else:
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    sampled = GradSampleModule(module)
    noisy = DPOptimizer(optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=batch)
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))

    def step() -> None:
        noisy.zero_grad()
        F.cross_entropy(sampled(x), y).backward()
        noisy.step()

    return step


def table(rows: list[dict[str, Any]]) -> Table:
    """Ratios to GroupNorm's step."""
    body = []
    for row in rows:
        ratios = [str(Quartiles(**row["ratio"][way])) for way in (EFFECTIVE, WHOLE, NONE)]
        body.append(
            (
                row["network"],
                str(row["batch"]),
                str(Quartiles(*(1e3 * row["group"][q] for q in ("low", "median", "high")))),
                *ratios,
            )
        )
    columns = ("network", "batch", f"{GROUP}, ms", f"{EFFECTIVE}, ×", f"{WHOLE}, ×", f"{NONE}, ×")
    return Table(columns, body, "A private step over GroupNorm's", words=(0,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each network and batch size")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--networks", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--ways", nargs="+", default=[GROUP, NONE, EFFECTIVE, WHOLE])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print what was run")
    options = parser.parse_args()
    if not options.report:
        warnings.filterwarnings("ignore")  # of Opacus: backward hooks on modules whose input needs no gradient
        torch.set_num_threads(1)
        keep_freed_memory()
        machine, rows = asdict(Machine.this()), []
        for name in options.networks:
            for batch in options.batch_size:
                rounds = measure({way: private(name, way, batch) for way in options.ways}, seconds=options.seconds)
                rows.append(
                    {
                        "network": name,
                        "batch": batch,
                        "rounds": len(rounds),
                        "group": asdict(rounds.seconds(GROUP, "cpu")),
                        "ratio": {way: asdict(rounds.ratio(way, GROUP, "cpu")) for way in options.ways if way != GROUP},
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
        command = f"python benchmarks/private_step.py --seconds {options.seconds:g}"
        result = {"command": command, "machine": machine, "rows": rows}
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(options.out.read_text())
    machine = result["machine"]
    place = f"{machine['processor']}, {machine['system']}, torch {machine['torch']}, load {machine['load']} before."
    print(f"    {result['command']}", place, table(result["rows"]).markdown(), sep="\n\n")


if __name__ == "__main__":
    main()
