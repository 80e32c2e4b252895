"""`normprop bench`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import tyro

from normprop.errors import NormPropError
from normprop.lab.commands.console import console, on_screen
from normprop.lab.cost.allocator import keep_freed_memory
from normprop.lab.cost.benchmark import measure_cost
from normprop.lab.cost.contenders import CONTENDERS
from normprop.lab.cost.cost_report import BatchCost, CostReport, ratio
from normprop.lab.cost.cost_tables import caption, tables
from normprop.lab.cost.rounds import Rounds
from normprop.lab.cost.workload import Workload
from normprop.lab.training.processes import processes
from normprop.lab.whole_file import write_whole

_LIBRARIES = ("torchvision:", "timm:")
_FIGURES = ("png", "svg", "pdf")


def bench(
    model: Annotated[str, tyro.conf.Positional] = "resnet20",
    *,
    batch_size: tuple[int, ...] = (1, 8, 64),
    against: tuple[str, ...] = ("plain", "batch"),
    seconds: float = 20.0,
    shape: str | None = None,
    classes: int | None = None,
    width: float = 1.0,
    accumulate: int = 1,
    compile: bool = False,
    channels_last: bool = False,
    threads: int | None = None,
    device: str = "auto",
    skip_memory: bool = False,
    out: Path | None = None,
    plot: Path | None = None,
    markdown: bool = False,
    json: bool = False,
) -> None:
    """Time and peak memory of a converted network, as ratios to the same network with another normaliser or none.

    For example `normprop bench resnet20 --batch-size 1 8 64 --against plain batch group layer`. Contenders take turns, so
    that other programs on the machine slow all of them alike: compare ratios, and trust them as far as their quartiles
    agree. Time is wall-clock time; CPU time adds up processors and leaves out waiting for other programs.

    Args:
        model: As in normprop train: resnet20, resnet18, nin …, torchvision:NAME, timm:NAME or module:function.
        batch_size: Batch sizes to measure at.
        against: Contenders: plain (no normaliser: layers with a bias), batch, group, layer, calibrated, paper; commas work.
        seconds: Time for training and for inference at each batch size; at least five rounds are run, whatever they take.
        shape: Shape of a sample; by default 3x32x32, or 3x224x224 for networks of torchvision and timm.
        classes: Number of outputs; by default 10, or 1000 for networks of torchvision and timm.
        width: Width factor of the built-in networks.
        accumulate: Batches per step of the optimizer.
        compile: Compile every network as one graph.
        channels_last: Keep images and filters in the channels-last memory format.
        threads: Threads for CPU arithmetic; by default torch's choice.
        device: auto, cpu, cuda, cuda:1, mps …
        skip_memory: Don't measure peak memory, which takes a process per contender and batch size.
        out: JSON file for all measurements.
        plot: File for a figure, .png, .svg or .pdf.
        markdown: Print tables for a page.
        json: Print JSON instead of tables.
    """
    if accumulate < 1 or (threads is not None and threads < 1):
        raise NormPropError("--accumulate and --threads count from 1.\nLeave them out for the defaults.")
    for path in (out, plot):
        if path and path.is_dir():
            raise NormPropError(f"{path} is a folder.\nName a file in it.")
    if plot and plot.suffix.lstrip(".") not in _FIGURES:
        raise NormPropError(f"A figure can't be written as {plot}.\nName a file that ends in .{' or .'.join(_FIGURES)}.")
    keep_freed_memory()
    foreign = model.startswith(_LIBRARIES)
    with processes(device) as group:
        workload = Workload(
            model=model,
            shape=sample_shape(shape or ("3x224x224" if foreign else "3x32x32")),
            classes=classes or (1000 if foreign else 10),
            width=width,
            device=str(group.device),
            threads=threads or torch.get_num_threads(),
            compiled=compile,
            channels_last=channels_last,
            accumulate=accumulate,
        )
        report = measure_cost(
            workload,
            batch_sizes=batch_size,
            against=[name for names in against for name in names.split(",") if name],
            seconds=seconds,
            memory=not skip_memory,
            tell=lambda text: print(text, file=sys.stderr),
        )
    _print(report, json=json, markdown=markdown)
    if out:
        write_whole(out, report.to_json().encode())
    if plot:
        _draw(report, plot)


def sample_shape(text: str) -> tuple[int, ...]:
    """The shape that a text such as 3x32x32 stands for.

    Example:
        >>> sample_shape("3x32x32")
        (3, 32, 32)

    Raises:
        NormPropError: for anything but numbers above 0 with an x between them.
    """
    sizes = tuple(int(size) if size.isdecimal() else 0 for size in text.split("x"))
    if 0 in sizes:
        raise NormPropError(f"--shape {text!r} isn't the shape of a sample.\nWrite channels, height and width like 3x32x32.")
    return sizes


def _print(report: CostReport, *, json: bool, markdown: bool) -> None:
    if json:
        print(report.to_json())
        return
    if markdown:
        print("\n\n".join([caption(report), *(table.markdown() for table in tables(report))]))
        return
    screen = console()
    screen.print(caption(report), soft_wrap=True, markup=False)
    for table in tables(report):
        screen.print(on_screen(table))
    for batch in report.batches:
        for name, reason in batch.failures.items():
            screen.print(
                f"{CONTENDERS[name].title} cannot train at {batch.batch_size}: {reason}", soft_wrap=True, markup=False
            )


def _draw(report: CostReport, path: Path) -> None:
    from normprop.lab.figures.cost_figure import RatioCurve, plot_ratios
    from normprop.lab.figures.image import image

    def curve(rival: str, rounds_of: Callable[[BatchCost], Rounds]) -> RatioCurve:
        ratios = {b.batch_size: r for b in report.batches if (r := ratio(rounds_of(b), rival)) is not None}
        return RatioCurve(CONTENDERS[rival].title, ratios)

    panels = {
        "training step": [curve(rival, lambda batch: batch.training) for rival in report.rivals],
        "inference, folded": [curve(rival, lambda batch: batch.inference) for rival in report.rivals],
    }
    figure = plot_ratios(panels, title=caption(report).splitlines()[0].rstrip("."), y_label="NormProp's time over that of")
    write_whole(path, image(figure, path.suffix.lstrip(".")))
