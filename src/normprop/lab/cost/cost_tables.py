"""The tables of a cost report: ratios with their quartiles, never a time alone."""

from __future__ import annotations

from normprop.lab.cost.contenders import CONTENDERS, SUBJECT
from normprop.lab.cost.cost_report import CONVERT, FOLD, LANE, READING, STEP, BatchCost, CostReport, ratio
from normprop.lab.cost.quartiles import Quartiles
from normprop.lab.cost.rounds import Rounds
from normprop.lab.pages.text_table import Table

_NONE = "–"
_MEGABYTE = 1e6


def tables(report: CostReport) -> list[Table]:
    """All tables of a report."""
    made = [_costs(report), _lane(report), _construction(report)]
    made += [_memory(report)] if any(batch.memory for batch in report.batches) else []
    made += [_compilation(report)] if report.workload.compiled else []
    return made


def caption(report: CostReport) -> str:
    """The network and the machine, in two lines."""
    work, machine = report.workload, report.machine
    options = ("compiled " if work.compiled else "") + ("channels-last " if work.channels_last else "")
    batches = f", {work.accumulate} batches to a step" if work.accumulate > 1 else ""
    parameters = report.weight_bytes / 4e6
    load = "" if machine.load is None else f", load {machine.load:g} before"
    return (
        f"{options}{work.model} on {'×'.join(map(str, work.shape))}, {parameters:.2f} M parameters{batches}; "
        f"{work.threads} thread{'s' * (work.threads > 1)} on {machine.device}.\n"
        f"{machine.processor}, {machine.cores} cores{load}; {machine.system}, "
        f"Python {machine.python}, torch {machine.torch}; lane in {machine.arithmetic}."
    )


def _costs(report: CostReport) -> Table:
    rows = []
    for batch in report.batches:
        for rival in report.rivals:
            cells = [str(batch.batch_size), CONTENDERS[rival].title]
            if rival in batch.failures:
                cells += ["cannot train", _NONE]
            else:
                cells += [_cell(ratio(batch.training, rival)), _cell(ratio(batch.training, rival, "cpu"))]
            cells += [_cell(ratio(batch.inference, rival)), _cell(ratio(batch.inference, rival, "cpu"))]
            cells.append(_memory_ratio(batch, rival))
            rows.append(tuple(cells))
    times = ("training, time", "training, CPU time", "inference, time", "inference, CPU time")
    columns = ("batch", "NormProp over", *times, "memory")
    title = "NormProp's cost over that of others: median of paired rounds [quartiles]"
    return Table(columns, rows, title, words=(1,))


def _lane(report: CostReport) -> Table:
    rows = []
    for batch in report.batches:
        rounds = batch.training
        rows.append(
            (
                str(batch.batch_size),
                _cell(_scaled(rounds.seconds(SUBJECT), 1e3)),
                _cell(rounds.ratio(LANE, SUBJECT)),
                _cell(_beyond_plain(rounds)),
                _cell(rounds.ratio(LANE, READING)),
                f"{len(batch.training)}, {len(batch.inference)}",
            )
        )
    columns = (
        "batch", "NormProp's step, ms", "share of the lane alone", "share beyond no normaliser",
        "lane over one reading of its weights", "rounds",
    )  # fmt: skip
    return Table(columns, rows, "The moment lane, forward and backward; rounds of training and of inference", words=())


def _beyond_plain(rounds: Rounds) -> Quartiles | None:
    """The share of a step that the network without normaliser doesn't have."""
    if "plain" not in rounds.wall:
        return None
    share = rounds.ratio("plain", SUBJECT)
    return Quartiles(1 - share.high, 1 - share.median, 1 - share.low)


def _construction(report: CostReport) -> Table:
    title = CONTENDERS[report.rivals[0]].title
    rows = [
        (name, _cell(report.construction.ratio(key, STEP)))
        for name, key in (("conversion", CONVERT), ("folding, with its check", FOLD))
    ]
    columns = ("", f"in training steps with {title} at batch size {report.construction_batch}")
    return Table(columns, rows, "Once for each network")


def _memory(report: CostReport) -> Table:
    rows = []
    for batch in report.batches:
        plain = batch.memory.get("plain")
        for name, peak in batch.memory.items():
            copies = _NONE if plain is None else f"{(peak.allocated - plain.allocated) / report.weight_bytes:+.2f}"
            resident = _NONE if peak.resident is None else f"{peak.resident / _MEGABYTE:.0f}"
            rows.append(
                (str(batch.batch_size), CONTENDERS[name].title, f"{peak.allocated / _MEGABYTE:.1f}", copies, resident)
            )
    columns = ("batch", "", "tensors, MB", "beyond no normaliser, copies of the weights", "process, MB")
    return Table(columns, rows, "Peak memory of training, beyond network and input", words=(1,))


def _compilation(report: CostReport) -> Table:
    rows = []
    for batch in report.batches:
        base = batch.first_step.get(report.rivals[0])
        for name, seconds in batch.first_step.items():
            over = _NONE if base is None else f"{seconds / base:.2f}"
            rows.append((str(batch.batch_size), CONTENDERS[name].title, f"{seconds:.1f}", over))
    columns = ("batch", "", "seconds", f"over {CONTENDERS[report.rivals[0]].title}")
    return Table(columns, rows, "First training step, with compilation (once, caches as they were)", words=(1,))


def _memory_ratio(batch: BatchCost, rival: str) -> str:
    if rival not in batch.memory or SUBJECT not in batch.memory:
        return _NONE
    return f"{batch.memory[SUBJECT].allocated / batch.memory[rival].allocated:.3f}"


def _scaled(quartiles: Quartiles, by: float) -> Quartiles:
    return Quartiles(quartiles.low * by, quartiles.median * by, quartiles.high * by)


def _cell(quartiles: Quartiles | None) -> str:
    return _NONE if quartiles is None else str(quartiles)
