"""Check normprop on a GPU in about ten minutes: promises, launches, cost in eager, compiled and captured form, training.

    python benchmarks/gpu.py                                # CUDA or MPS, whichever there is
    python benchmarks/gpu.py --only promises launches       # parts of it
    python benchmarks/gpu.py --device cpu --only promises   # a dry run

Writes benchmarks/results/gpu.json, and prints it as tables. Training takes CIFAR-10 from $NORMPROP_DATA, as `normprop train`
does, and is left out without it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import normprop
from normprop.errors import NormPropError
from normprop.lab.cost.benchmark import measure_cost
from normprop.lab.cost.cost_report import ratio
from normprop.lab.cost.workload import Workload
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer
from normprop.lab.pages.text_table import Table
from normprop.lab.samples.datasets import load

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
PARTS = ("promises", "launches", "cost", "captured", "training")
NETWORKS = ("resnet20", "torchvision:resnet18", "torchvision:mobilenet_v3_small")
# What starts no kernel.
VIEWS = {
    "view", "_unsafe_view", "reshape", "expand", "split", "split_with_sizes", "unbind", "t", "transpose", "permute", "slice",
    "select", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "unflatten", "movedim", "empty", "empty_like",
}  # fmt: skip


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if name.startswith("torchvision:"):
        return torchvision.models.get_model(name.partition(":")[2], num_classes=10), (3, 96, 96)
    return build(name, shape=(3, 32, 32), classes=10, norm=normalizer("batch")), (3, 32, 32)


def converted(name: str, device: torch.device) -> tuple[nn.Module, tuple[int, ...]]:
    model, shape = network(name)
    return normprop.convert(model, example=torch.zeros(2, *shape)).to(device), shape


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found.double().cpu() - expected.double().cpu()).abs().max() / expected.double().abs().max().cpu())


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# Promises: each gives how far a network is from keeping it.


def batch_independence(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return off(torch.cat([model(x[i : i + 1]) for i in range(len(x))]), model(x))


def both_modes(model: nn.Module, x: Tensor) -> float:
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # what the user made random is none of ours
            module.p = 0.0
    with torch.no_grad():
        return off(copy.deepcopy(model).train()(x), copy.deepcopy(model).eval()(x))


def gradients_add(model: nn.Module, x: Tensor) -> float:
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    whole(x).square().sum().backward()
    for i in range(len(x)):
        parts(x[i : i + 1]).square().sum().backward()
    return off(gradients(parts), gradients(whole))


def as_on_a_cpu(model: nn.Module, x: Tensor) -> float:
    here, there = copy.deepcopy(model), copy.deepcopy(model).cpu()
    here(x).square().sum().backward()
    there(x.cpu()).square().sum().backward()
    return off(gradients(here), gradients(there))


def folds(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return off(normprop.fold(model)(x), model(x))


def compiles(model: nn.Module, x: Tensor) -> float:
    torch._dynamo.reset()
    other = torch.compile(copy.deepcopy(model), fullgraph=True)
    with torch.no_grad():
        return off(other(x), model(x))


def trains_in_bf16(model: nn.Module, x: Tensor) -> float:
    model = copy.deepcopy(model)
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    return 0.0 if bool(gradients(model).isfinite().all()) else math.inf


def is_captured(model: nn.Module, x: Tensor) -> float:
    """Forward and backward as a CUDA graph: no step of them may wait for the host."""
    if x.device.type != "cuda":
        raise NormPropError(f"there are no graphs to capture on {x.device.type}")
    expected, model = copy.deepcopy(model), copy.deepcopy(model)
    step = captured(lambda: model(x).square().sum().backward(), model)
    step()
    expected(x).square().sum().backward()
    return off(gradients(model), gradients(expected))


PROMISES: dict[str, tuple[Callable[[nn.Module, Tensor], float], float]] = {
    "a sample's output doesn't depend on its batch": (batch_independence, 1e-4),
    "training and evaluation compute the same": (both_modes, 1e-5),
    "gradients add": (gradients_add, 1e-3),
    "gradients are those of a CPU": (as_on_a_cpu, 1e-2),
    "fold changes nothing": (folds, 1e-4),
    "compiles as one graph": (compiles, 1e-3),
    "trains in bfloat16": (trains_in_bf16, 0.0),
    "is captured as a CUDA graph": (is_captured, 1e-3),
}


def promises(device: torch.device) -> Iterator[dict[str, Any]]:
    """Every promise on every network, in float32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in NETWORKS:
        model, shape = converted(name, device)
        model.eval()
        x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).to(device)
        for title, (promise, most) in PROMISES.items():
            try:
                found = promise(model, x)
                yield {"network": name, "promise": title, "off by": found, "kept": found <= most}
            except NormPropError as error:
                yield {"network": name, "promise": title, "off by": str(error), "kept": None}
            except Exception as error:  # all that a device may raise is a finding
                reason = str(error).splitlines()[0][:120]
                yield {"network": name, "promise": title, "off by": reason, "kept": False}


class Launches(TorchDispatchMode):
    """Counts operations that start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


def launches(device: torch.device) -> Iterator[dict[str, Any]]:
    """Operations of the lane alone, per site: an upper bound on kernels."""
    for name in NETWORKS:
        model, shape = converted(name, device)
        model(torch.zeros(1, *shape, device=device))
        lane = normprop.lane(model)
        entries = lane.entries[model.training]
        program = lane.program(entries)
        with Launches() as forward:
            found = [t for scale in program.function(model) for t in scale if t is not None]
        with Launches() as backward:
            torch.autograd.backward(found, [torch.ones_like(t) for t in found])
        yield {
            "network": name,
            "sites": len(entries),
            "forward": forward.count / len(entries),
            "backward": backward.count / len(entries),
        }


def cost(device: torch.device) -> Iterator[dict[str, Any]]:
    """A training step over that of other normalisers, eager and compiled."""
    for name in NETWORKS:
        shape = network(name)[1]
        for compiled in (False, True):
            workload = Workload(name, shape=shape, device=str(device), compiled=compiled)
            report = measure_cost(workload, against=("plain", "batch", "group"), seconds=4.0, memory=False)
            for batch in report.batches:
                row: dict[str, Any] = {
                    "network": name,
                    "form": "compiled" if compiled else "eager",
                    "batch": batch.batch_size,
                }
                for rival in ("plain", "batch", "group"):
                    quartiles = ratio(batch.training, rival)
                    row[f"over {rival}"] = None if quartiles is None else quartiles.median
                yield row


def captured(work: Callable[[], Any], model: nn.Module) -> Callable[[], None]:
    """Work as a CUDA graph, after three rounds of it on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            work()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def captured_cost(device: torch.device) -> Iterator[dict[str, Any]]:
    """A training step replayed as a CUDA graph, over that of the network without normaliser and with BatchNorm."""
    if device.type != "cuda":
        raise NormPropError(f"there are no graphs to capture on {device.type}")
    for name in NETWORKS:
        for size in (1, 8, 64):
            steps = {}
            for norm in ("normprop", "plain", "batch"):
                workload = Workload(name, shape=network(name)[1], device=str(device))
                model = workload.contender(norm).train()
                x = torch.randn(size, *workload.shape, device=device)
                y = torch.randint(0, 10, (size,), device=device)
                optimizer = torch.optim.SGD(model.parameters(), 1e-9, momentum=0.9)

                def step(model: nn.Module = model, x: Tensor = x, y: Tensor = y, optimizer: Any = optimizer) -> None:
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()

                steps[norm] = captured(step, model)
            times: dict[str, list[float]] = {norm: [] for norm in steps}
            for _ in range(40):
                for norm, replay in steps.items():
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(5):
                        replay()
                    torch.cuda.synchronize()
                    times[norm].append(time.perf_counter() - start)
            row: dict[str, Any] = {"network": name, "form": "captured", "batch": size}
            for rival in ("plain", "batch"):
                ratios = [a / b for a, b in zip(times["normprop"], times[rival], strict=True)]
                row[f"over {rival}"] = statistics.median(ratios)
            yield row


def training(device: torch.device, minutes: float) -> Iterator[dict[str, Any]]:
    """The paper's network at full width on CIFAR-10, all of it held on the device, NormProp and BatchNorm for equal time."""
    data = load("cifar10")
    tensors = [t.to(device) for t in (data.x_train, data.y_train, data.x_test, data.y_test)]
    mean, std = tensors[0].float().mean(), tensors[0].float().std()
    x, y, x_test, y_test = (tensors[0].float() - mean) / std, tensors[1], (tensors[2].float() - mean) / std, tensors[3]
    for norm in ("normprop", "batch"):
        torch.manual_seed(0)
        model = build("nin", shape=(3, 32, 32), classes=10, norm=normalizer("batch"))
        model = (normprop.convert(model, example=x[:2].cpu()) if norm == "normprop" else model).to(device)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        if norm == "normprop":
            normprop.keep_calibrated(model, optimizer, x[:512])
        start, steps, seen = time.perf_counter(), 0, 0
        while time.perf_counter() - start < 60 * minutes:
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * max(1.0 - (time.perf_counter() - start) / (60 * minutes), 0.02)
            chosen = torch.randint(0, len(x), (128,), device=device)
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps, seen = steps + 1, seen + 128
        model.eval()
        with torch.no_grad():
            right = sum(
                int((model(a).argmax(1) == b).sum()) for a, b in zip(x_test.split(500), y_test.split(500), strict=True)
            )
        yield {
            "norm": norm,
            "minutes": minutes,
            "epochs": seen / len(x),
            "loss": float(loss),
            "accuracy": right / len(x_test),
        }


def chosen_device(name: str | None) -> torch.device:
    """The device asked for, or whichever GPU there is.

    Raises:
        SystemExit: there is none.
    """
    if name is not None:
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise SystemExit(
        "gpu.py: this machine has no GPU that torch can use (neither CUDA nor MPS).\n"
        "Run it on one that has, or try its parts with --device cpu."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cuda, cuda:1, mps; cpu for a dry run")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts")
    parser.add_argument("--minutes", type=float, default=1.5, help="of training each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = chosen_device(options.device)
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "promises": lambda: promises(device),
        "launches": lambda: launches(device),
        "cost": lambda: cost(device),
        "captured": lambda: captured_cost(device),
        "training": lambda: training(device, options.minutes),
    }
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    results: dict[str, Any] = {"device": title, "torch": torch.__version__}
    for part in options.only:
        try:
            rows = []
            for row in parts[part]():
                rows.append(row)
                print(f"{part}: {row}", flush=True)
            results[part] = rows
        except NormPropError as error:
            results[part] = str(error).splitlines()[0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    for part in options.only:
        found = results[part]
        if isinstance(found, str):
            print(f"\n{part}: {found}")
        elif found:
            cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in found]
            print("\n" + Table(tuple(found[0]), [tuple(row) for row in cells], part).markdown())
    broken = [row for row in results.get("promises", ()) if isinstance(row, dict) and row["kept"] is False]
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
