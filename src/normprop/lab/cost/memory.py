"""Peak memory of training, measured in a process per contender."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from normprop.lab.cost.rounds import Step
from normprop.lab.cost.workload import Workload

_STEPS = 5
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that training holds at any moment beyond the network as built and its input, in bytes.

    Attributes:
        allocated: Memory of tensors, counted by torch's allocator: activations, gradients, momentum and the workspaces of
            operations. It repeats to the byte.
        resident: Memory of the process, as the system counts pages, or on CUDA what torch reserved; including what the
            allocator keeps for later, and a few megabytes of noise. None where the system doesn't tell.
    """

    allocated: int
    resident: int | None


def peak_memory(workload: Workload, name: str, batch_size: int) -> PeakMemory:
    """Peak memory of a contender's training, measured in a fresh process."""
    # Spawned: a forked process would begin with its parent's memory.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, workload, name, batch_size).result()


def measured(workload: Workload, name: str, batch_size: int) -> PeakMemory:
    """Peak memory of a contender's training, measured in this process, which should have done nothing else.

    Args:
        workload: The training.
        name: Name of the contender.
        batch_size: Samples per batch.
    """
    torch.set_num_threads(workload.threads)
    network = workload.contender(name)
    # Tensors on a CPU have no allocator that keeps count; a step that compiles would count the compiler's.
    step = workload.training_step(network, batch_size)
    gc.collect()
    if torch.device(workload.device).type == "cuda":
        return _on_cuda(step)
    before = _resident("VmRSS")
    if workload.compiled:
        step()
    _forget_peak()
    _repeat(step)
    after = _resident("VmHWM")
    network.zero_grad()
    return PeakMemory(
        _allocated(workload.training_step(network, batch_size)),
        None if before is None or after is None else after - before,
    )


def _repeat(step: Step) -> None:
    for _ in range(_STEPS):
        step()


def _on_cuda(step: Step) -> PeakMemory:
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    _repeat(step)
    torch.cuda.synchronize()
    return PeakMemory(torch.cuda.max_memory_allocated() - allocated, torch.cuda.max_memory_reserved() - reserved)


def _allocated(step: Step) -> int:
    """The peak in the profiler's record of two steps; the first of them makes the optimizer's state."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it notes on stderr that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    counts = [event["args"] for event in sorted(_memory_events(events), key=lambda event: float(event["ts"]))]
    before = counts[0]["Total Allocated"] - counts[0]["Bytes"]  # of earlier records in this process
    return int(max(count["Total Allocated"] for count in counts) - before)


def _memory_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("name") == "[memory]"]


def _resident(field: str) -> int | None:
    """A field of the process's status in bytes: VmRSS now, VmHWM at its highest; None where there is no such file."""
    # Not getrusage's ru_maxrss: a spawned process begins with its parent's.
    found = re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    return 1024 * int(found[1]) if found else None


def _forget_peak() -> None:
    """Reset the highest count: building a network may have taken more than training it."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
