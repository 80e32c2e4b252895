"""The measurement of NormProp's cost beside other normalisers and none."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from normprop.conversion.folding import fold
from normprop.errors import NormPropError
from normprop.lab.cost.contenders import CONTENDERS, SUBJECT, rivals
from normprop.lab.cost.cost_report import CONVERT, FOLD, LANE, READING, STEP, BatchCost, CostReport
from normprop.lab.cost.lane_alone import lane_step, reading_step
from normprop.lab.cost.machine import Machine
from normprop.lab.cost.memory import peak_memory
from normprop.lab.cost.rounds import LEAST_ROUNDS, Rounds, Step, measure
from normprop.lab.cost.workload import Workload

Teller = Callable[[str], None]


def measure_cost(
    workload: Workload,
    *,
    batch_sizes: Sequence[int] = (1, 8, 64),
    against: Sequence[str] = ("plain", "batch"),
    seconds: float = 20.0,
    memory: bool = True,
    tell: Teller = lambda _: None,
    least: int = LEAST_ROUNDS,
) -> CostReport:
    """Time a converted network and its rivals in turns: training, inference, the moment lane, conversion; and their memory.

    Args:
        workload: The work of each contender.
        batch_sizes: The batch sizes to measure at.
        against: Names of contenders; conversion and compilation are measured in units of the first.
        seconds: Time for training, inference and conversion, each at each batch size, without warm-up.
        memory: Whether to measure peak memory, which takes a process per contender; only on CPU and CUDA.
        tell: Told what is being done.
        least: The least number of rounds of each measurement, whatever they take.

    Raises:
        NormPropError: for an unknown contender or network, a network without BatchNorm or that doesn't run on such samples,
            a batch size below 1.
    """
    names = rivals(list(against))
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1 or seconds < 0:
        raise NormPropError(
            "A benchmark needs batch sizes of 1 or more and --seconds of 0 or more.\nTry --batch-size 1 8 64."
        )
    torch.set_num_threads(workload.threads)
    machine = Machine.this(workload.device)
    if machine.is_too_busy(workload.threads):
        tell(
            f"The machine is busy (load {machine.load} on {machine.cores} cores) and threads will wait for one another. "
            "Come back when it is idle, or use --threads 1 and read CPU time."
        )
    if workload.compiled:
        _load_compiler()
    run = _Benchmark(workload, (SUBJECT, *names), seconds, least, tell)
    counted = torch.device(workload.device).type in ("cpu", "cuda")
    batches = [run.batch(size, memory=memory and counted) for size in sizes]
    base = next((b.batch_size for b in batches if names[0] not in b.failures), None)
    if base is None:
        raise NormPropError(f"{names[0]} trains at none of these batch sizes.\nName another contender first.")
    return CostReport(
        machine=machine,
        workload=workload,
        rivals=tuple(names),
        seconds=seconds,
        weight_bytes=sum(p.numel() * p.element_size() for p in workload.contender("plain").parameters()),
        batches=tuple(batches),
        construction=run.construction(names[0], base),
        construction_batch=base,
    )


def _load_compiler() -> None:
    """Compile something small: the first compilation of a process takes seconds more than the others."""
    torch.compile(nn.Linear(1, 1))(torch.ones(1, 1)).sum().backward()


class _Benchmark:
    """The measurements of one workload."""

    def __init__(self, workload: Workload, names: Sequence[str], seconds: float, least: int, tell: Teller) -> None:
        self.workload, self.names, self.seconds, self.least, self.tell = workload, names, seconds, least, tell

    def batch(self, size: int, *, memory: bool) -> BatchCost:
        """Everything at one batch size."""
        if self.workload.compiled:
            torch.compiler.reset()
        self.tell(f"batch size {size}: training")
        steps, failures, first = self._training_steps(size)
        lane = self.workload.lane()
        extra = {LANE: lane_step(lane, compiled=self.workload.compiled), READING: reading_step(lane)}
        training = self._measured(steps | extra)
        self.tell(f"batch size {size}: inference")
        inference = self._measured(
            {name: self.workload.inference_step(self.workload.deployed(name), size) for name in self.names}
        )
        peaks = {}
        for name in steps if memory else ():
            self.tell(f"batch size {size}: memory of {CONTENDERS[name].title}")
            peaks[name] = peak_memory(self.workload, name, size)
        return BatchCost(size, training, inference, peaks, failures, first)

    def construction(self, rival: str, size: int) -> Rounds:
        """Conversion and folding beside a training step of a rival."""
        self.tell("conversion")
        original = self.workload.original()
        convert = partial(CONTENDERS[SUBJECT].build, original, self.workload.shape)
        step = self.workload.training_step(self.workload.contender(rival), size)
        return self._measured({CONVERT: convert, FOLD: partial(fold, convert()), STEP: step})

    def _measured(self, steps: dict[str, Step]) -> Rounds:
        return measure(steps, seconds=self.seconds, device=self.workload.device, least=self.least)

    def _training_steps(self, size: int) -> tuple[dict[str, Step], dict[str, str], dict[str, float]]:
        """Steps of the contenders that can train; why the others can't; seconds of each first step."""
        steps: dict[str, Step] = {}
        failures: dict[str, str] = {}
        first: dict[str, float] = {}
        for name in self.names:
            step = self.workload.training_step(self.workload.contender(name), size)
            start = time.perf_counter()
            try:
                step()
            except ValueError as error:  # from BatchNorm with one value per channel
                if name == SUBJECT:
                    raise
                failures[name] = str(error).splitlines()[0]
                continue
            steps[name], first[name] = step, time.perf_counter() - start
        return steps, failures, first
