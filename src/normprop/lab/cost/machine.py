"""The machine that something was measured on."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from normprop.native.library import library

_CPUS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """A computer and its software.

    Attributes:
        processor: Name of the CPU, and the widest instructions that torch uses of it.
        cores: Number of cores that the system shows.
        device: Name of the accelerator, or cpu.
        system: Operating system and architecture.
        python: Version of Python.
        torch: Version of torch.
        arithmetic: The engine of the moment lane.
        load: Mean number of processes that ran or waited in the minute before the measurement; None if unknown.
    """

    processor: str
    cores: int
    device: str
    system: str
    python: str
    torch: str
    arithmetic: str
    load: float | None

    @classmethod
    def this(cls, device: str = "cpu") -> Machine:
        """The computer that runs this.

        Example:
            >>> Machine.this().device
            'cpu'
        """
        cuda = torch.device(device).type == "cuda"
        return cls(
            processor=_processor(),
            cores=os.cpu_count() or 1,
            device=torch.cuda.get_device_name(device) if cuda else device,
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            torch=torch.__version__,
            arithmetic=_arithmetic(device),
            load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        )

    def is_too_busy(self, threads: int) -> bool:
        """Whether other programs leave fewer cores than there are threads, which then wait for one another.

        Example:
            >>> from dataclasses import replace
            >>> busy = replace(Machine.this(), cores=4, load=2.5)
            >>> busy.is_too_busy(1), busy.is_too_busy(2)
            (False, True)
        """
        return self.load is not None and self.load + threads > self.cores


def _arithmetic(device: str) -> str:
    native = library()
    if torch.device(device).type != "cpu":
        return "torch"
    return f"torch ({native})" if isinstance(native, str) else "C"


def _processor() -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", _CPUS.read_text(), re.MULTILINE) if _CPUS.exists() else None
    name = named[1] if named else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
