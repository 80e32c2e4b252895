"""The compiled arithmetic: built by the machine's own C compiler when it is first asked for, then kept."""

from __future__ import annotations

import array
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from normprop.native.structures import Curve, MomentOperation, SiteScaling

_SOURCES = [Path(__file__).with_name(name) for name in ("scales.c", "rectifiers.c", "curves.c", "moments.c", "lane.c")]
_HEADERS = [Path(__file__).with_name(name) for name in ("threads.h", "scales.h", "curves.h", "moments.h", "rectify.h")]
_FLAGS = ("-std=c11", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp-simd", "-shared", "-fPIC")
_SUFFIXES = {torch.float32: "float", torch.float64: "double"}
# With fewer numbers than this, handing work to other threads takes longer than doing it.
_WORTH_SHARING = 1 << 15
# About how many numbers of a weight one channel of an activation costs.
NODES = 64


class Library:
    """The compiled functions.

    Args:
        compiled: the loaded library.
    """

    def __init__(self, compiled: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._scales = _typed(compiled, "scales", [pointer, pointer, number, pointer, number], ctypes.c_int)
        self._rectifiers = _typed(compiled, "rectifiers", [pointer, number, ctypes.c_double], None)
        self._curve = _typed(compiled, "curve", [pointer, pointer, number, pointer, number], None)
        laid = [pointer, number, pointer, number, number, pointer, pointer]
        self._lane = _typed(compiled, "lane", [*laid, pointer, pointer, pointer, number], ctypes.c_int)
        gradients = [*laid, pointer, pointer, pointer, pointer, number, pointer, pointer, number]
        self._lane_gradients = _typed(compiled, "lane_gradients", gradients, ctypes.c_int)
        # The threads that torch computes with, if torch has them from GNU's OpenMP: two sets would fight for the cores.
        parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        self._parallel = None if parallel is None else ctypes.cast(parallel, pointer)

    def scales(
        self, dtype: torch.dtype, sites: Sequence[int], gradients: Sequence[int] | None, count: int, numbers: int
    ) -> None:
        """The scales of sites, or gradients.

        Args:
            dtype: of all numbers.
            sites: the fields of scales.c's `site`, of one site behind the other.
            gradients: the fields of its `gradients`, if these are wanted.
            count: of the sites.
            numbers: how many weights they have in all.

        Raises:
            MemoryError: there is none.
        """
        others = None if gradients is None else _Fields(gradients)
        threads = torch.get_num_threads() if numbers >= _WORTH_SHARING else 1
        if self._scales[dtype](_Fields(sites), others, count, self._parallel, threads):
            raise MemoryError("no memory for the moments of a layer")

    def rectifiers(self, dtype: torch.dtype, tensors: Sequence[int], count: int, slope: float) -> None:
        """Moments behind leaky rectifiers, or gradients.

        Args:
            dtype: of all numbers.
            tensors: the fields of rectifiers.c's `rectifier`, of one tensor behind the other.
            count: of the tensors.
            slope: of the rectifier below zero.
        """
        self._rectifiers[dtype](_Fields(tensors), count, slope)

    def curve(self, curve: Curve, numbers: torch.Tensor) -> None:
        """Moments behind one activation, and their derivatives.

        Args:
            curve: the activation.
            numbers: ``(8, n)``, contiguous: means and variances in the first two rows; what comes out is written into the
                others, as E f, Var f, ∂E/∂m, ∂E/∂v, ∂Var/∂m and ∂Var/∂v.
        """
        size = numbers.shape[1]
        threads = torch.get_num_threads() if size * NODES >= _WORTH_SHARING else 1
        self._curve[numbers.dtype](ctypes.byref(curve), numbers.data_ptr(), size, self._parallel, threads)

    def lane(
        self,
        dtype: torch.dtype,
        layout: NativeLayout,
        tensors: Sequence[int],
        outputs: Sequence[int],
        memory: int,
        columns: int,
    ) -> None:
        """A segment of a lane.

        Args:
            dtype: of all numbers.
            layout: what is computed.
            tensors: addresses of what is read.
            outputs: of each site's effective weight, 0 without a layer.
            memory: of the moments.
            columns: of five numbers a channel.

        Raises:
            MemoryError: there is none.
        """
        threads = torch.get_num_threads() if layout.numbers >= _WORTH_SHARING else 1
        given = _Fields(tensors), _Fields(outputs), memory, columns, self._parallel, threads
        if self._lane[dtype](*layout.arguments, *given):
            raise MemoryError("no memory for the moments of a layer")

    def lane_gradients(
        self,
        dtype: torch.dtype,
        layout: NativeLayout,
        tensors: Sequence[int],
        grads: Sequence[int],
        by_weights: Sequence[int],
        turned: Sequence[bool],
        results: Sequence[int],
        memory: tuple[int, int],
        columns: int,
    ) -> None:
        """Gradients of a segment of a lane.

        Args:
            dtype: of all numbers.
            layout: what was computed.
            tensors: addresses of what was read.
            grads: of gradients of outputs: three a site, then of moments; 0 for none.
            by_weights: of where each site's gradient of its weight goes, 0 where that isn't wanted.
            turned: which of them have taps inside inputs in memory, where all else of that site has them outside.
            results: of where gradients of all else that was read are added; 0 where they aren't wanted.
            memory: of the moments, and how many numbers.
            columns: as `lane` left them.

        Raises:
            MemoryError: there is none.
        """
        threads = torch.get_num_threads() if layout.numbers >= _WORTH_SHARING else 1
        given = *map(_Fields, (tensors, grads, by_weights, turned, results)), *memory, columns
        if self._lane_gradients[dtype](*layout.arguments, *given, self._parallel, threads):
            raise MemoryError("no memory for the moments of a layer")


class NativeLayout(NamedTuple):
    """What a segment of a lane computes, as C reads it.

    Attributes:
        operations: on moments.
        scalings: of sites.
        channels: of all sites.
        numbers: how many weights there are, or what costs as much.
        curves: that operations point to.
    """

    operations: ctypes.Array[MomentOperation]
    scalings: ctypes.Array[SiteScaling]
    channels: int
    numbers: int
    curves: tuple[Curve, ...]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Both arrays with their lengths, and the channels."""
        return self.operations, len(self.operations), self.scalings, len(self.scalings), self.channels


@functools.cache
def library() -> Library | str:
    """The compiled functions, or why there are none.

    They are built with `$CC` or `cc`, and `$CFLAGS` behind flags of their own, into `$XDG_CACHE_HOME/normprop`
    (`~/.cache/normprop`), which takes about a second and happens once for a processor and version. `NORMPROP_NATIVE=0` in
    the environment does without.
    """
    if os.environ.get("NORMPROP_NATIVE") == "0":
        return "switched off by NORMPROP_NATIVE=0"
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return "no C compiler (cc)"
    try:
        return Library(ctypes.CDLL(str(_built(compiler))))
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {error.stderr.strip().splitlines()[-1] if error.stderr.strip() else error}"
    except (OSError, AttributeError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: no home folder
        return f"{type(error).__name__}: {error}"


def _built(compiler: str) -> Path:
    """The library's file, which a build that is still going on never touches.

    Its name ends with a checksum of what is in it: one that isn't whole is built anew; loading it would end the process.
    """
    sources = [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
    flags = [*_FLAGS, *shlex.split(os.environ.get("CFLAGS", ""))]
    key = hashlib.sha256(b"\0".join([*sources, compiler.encode(), *(f.encode() for f in flags), _processor()])).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "normprop"
    there = list(folder.glob(f"lane-{key[:16]}-*.so"))
    for path in there:
        if path.stem.endswith(_checksum(path)):
            return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        fresh = Path(place) / "lane.so"
        command = [compiler, *flags, *map(str, _SOURCES), "-o", str(fresh), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        path = folder / f"lane-{key[:16]}-{_checksum(fresh)}.so"
        fresh.replace(path)
    for broken in there:
        if broken != path:
            broken.unlink(missing_ok=True)
    return path


def _checksum(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except FileNotFoundError:  # another process has replaced it
        return "none"


def _processor() -> bytes:
    """What tells one kind of processor from another: a home folder may be shared by several."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        kept = [line for line in facts.splitlines() if line.startswith(("flags", "Features", "model name", "CPU part"))]
        return "\n".join(kept).encode()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()


def _typed(compiled: ctypes.CDLL, name: str, arguments: list[Any], result: Any) -> dict[torch.dtype, Any]:
    """A function for each dtype."""
    functions = {dtype: getattr(compiled, f"{name}_{end}") for dtype, end in _SUFFIXES.items()}
    for function in functions.values():
        function.argtypes, function.restype = arguments, result
    return functions


class _Fields:
    """Numbers of 64 bits as an argument; an array of ctypes takes three times as long to make."""

    def __init__(self, values: Sequence[int]) -> None:
        self.numbers = array.array("q", values)
        self._as_parameter_ = self.numbers.buffer_info()[0]
