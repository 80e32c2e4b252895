"""The compiled arithmetic: built by the machine's own C compiler when it is first asked for, then kept."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("scales.c")
_FLAGS = ("-std=c11", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp-simd", "-shared", "-fPIC")
_SUFFIXES = {torch.float32: "float", torch.float64: "double"}
# With fewer numbers than this, handing work to other threads takes longer than doing it.
_WORTH_SHARING = 1 << 15

Run = Callable[[torch.dtype, Sequence[int], Sequence[int] | None, int, int], None]


@functools.cache
def library() -> Run | str:
    """A function that computes the scales of sites, or why there is none.

    It is built with `$CC` or `cc` into `$XDG_CACHE_HOME/normprop` (`~/.cache/normprop`), which takes about a second and
    happens once for a processor and version. `NORMPROP_NATIVE=0` in the environment does without.
    """
    if os.environ.get("NORMPROP_NATIVE") == "0":
        return "switched off by NORMPROP_NATIVE=0"
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return "no C compiler (cc)"
    try:
        return _bound(ctypes.CDLL(str(_built(compiler))))
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {error.stderr.strip().splitlines()[-1] if error.stderr.strip() else error}"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def _built(compiler: str) -> Path:
    """The library's file, which a build that is still going on never touches."""
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join([source, compiler.encode(), *(f.encode() for f in _FLAGS), _processor()])).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "normprop"
    path = folder / f"scales-{key[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        fresh = Path(place) / path.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(fresh), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        fresh.replace(path)
    return path


def _processor() -> bytes:
    """What tells one kind of processor from another: a home folder may be shared by several."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        kept = [line for line in facts.splitlines() if line.startswith(("flags", "Features", "model name", "CPU part"))]
        return "\n".join(kept).encode()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()


def _bound(compiled: ctypes.CDLL) -> Run:
    functions: dict[torch.dtype, Any] = {dtype: getattr(compiled, f"scales_{end}") for dtype, end in _SUFFIXES.items()}
    for function in functions.values():
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        function.restype = ctypes.c_int
    # The threads that torch computes with, if torch has them from GNU's OpenMP: two sets would fight for the cores.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    address = None if parallel is None else ctypes.cast(parallel, ctypes.c_void_p)

    def run(dtype: torch.dtype, sites: Sequence[int], gradients: Sequence[int] | None, count: int, numbers: int) -> None:
        """Call it with the fields of all sites, and of their gradients, one behind the other.

        Raises:
            MemoryError: there is none.
        """
        fields = (ctypes.c_int64 * len(sites))(*sites)
        others = None if gradients is None else (ctypes.c_int64 * len(gradients))(*gradients)
        threads = torch.get_num_threads() if numbers >= _WORTH_SHARING else 1
        if functions[dtype](fields, others, count, address, threads):
            raise MemoryError("no memory for the moments of a layer")

    return run
