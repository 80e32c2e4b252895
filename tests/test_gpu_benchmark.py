"""The benchmark for GPUs, as far as a machine without one can run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normprop
from tests.zoo import SMALL

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"
# What makes the host wait for a device.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    found = run()
    assert found.returncode == 1
    assert found.stderr.startswith("gpu.py: this machine has no GPU")


def test_a_dry_run(tmp_path: Path) -> None:
    found = run("--device", "cpu", "--only", "launches", "captured", "--out", str(tmp_path / "gpu.json"))
    assert found.returncode == 0, found.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["captured"] == "there are no graphs to capture on cpu"
    assert {row["network"] for row in results["launches"]} >= {"resnet20"}
    assert all(row["forward"] > 0 and row["backward"] > 0 for row in results["launches"])


class Names(torch.utils._python_dispatch.TorchDispatchMode):
    """The operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SMALL)
def test_no_step_waits_for_the_device(name: str) -> None:
    """A GPU runs ahead of its host, and what it runs can be captured, if nothing asks for a value."""
    torch.manual_seed(0)
    network, shape = SMALL[name]
    model = normprop.convert(network(), example=torch.zeros(2, *shape))
    lane = normprop.lane(model)
    with Names() as names:
        found = [t for scale in lane.evaluate(model, lane.entries[True]).values() for t in scale if t is not None]
        torch.autograd.backward(found, [torch.ones_like(t) for t in found])
    assert "mul" in names.found
    assert not names.found & WAITING
