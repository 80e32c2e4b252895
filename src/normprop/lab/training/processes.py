"""The processes that share a run: one, or those that torchrun starts."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normprop.errors import NormPropError


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of the run, and its device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, with its gradients averaged over the processes."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def total(self, values: Sequence[float | Tensor]) -> list[float]:
        """Each value summed over the processes."""
        if self.world == 1:
            return [float(value) for value in values]
        sums = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(value) for value in sums]

    def wait(self) -> None:
        """Return when every process has called this."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did; within another such block, stay joined.

    Args:
        device: `auto` (CUDA where there is one, else CPU) or a torch device.

    Raises:
        NormPropError: for a device that this machine lacks.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cuda" and world > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise NormPropError(f"Device {name!r} can't be used: {reason}\nUse --device cpu.") from error
    if "RANK" not in os.environ or world == 1:
        yield Processes(chosen)
        return
    if dist.is_initialized():
        yield Processes(chosen, rank, world)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # DistributedDataParallel imports this. Whatever imports it while a group exists keeps that group, and with it threads
    # that outlive destroy_process_group and can abort an interpreter that is shutting down.
    importlib.import_module("torch._dynamo")  # too slow to import for a process that is alone
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(chosen, rank, world)
    finally:
        dist.destroy_process_group()
