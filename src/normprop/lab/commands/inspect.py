"""`normprop inspect`."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import tyro

from normprop.data import InputStats, Standardize
from normprop.errors import NormPropError
from normprop.inspection.measurement import inspect as inspect_model
from normprop.lab.networks import models
from normprop.lab.networks.normalizers import normalizer, realize
from normprop.lab.samples import datasets


def inspect(
    model: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    data: str | None = None,
    samples: int = 500,
    norm: str = "batch",
    width: float = 1.0,
    coverage: tuple[str, ...] = (),
    html: Path | None = None,
    log: Path | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Print what is wrong with a network, the mean and std that every tensor should have and, with data, those it has.

    For example `normprop inspect resnet20 --norm normprop --data cifar10`, or
    `normprop inspect --coverage timm:resnet50 timm:levit_128s` to see which networks convert.

    Args:
        model: As in normprop train: nin, resnet20 …, torchvision:NAME, timm:NAME or module:function.
        data: Data set to measure on, standardised by its own statistics; without it there are only predictions.
        samples: Number of training images to measure on.
        norm: Normaliser of the network, as in normprop train.
        width: Width factor of the built-in networks.
        coverage: Names of networks; print for each whether it converts and what is approximate.
        html: File for an interactive page: the network as a graph, and a table.
        log: Log of a MomentProbe, for the page's slider over training.
        plot: File for a figure of mean, standard deviation and growth over depth (.png, .svg, .pdf).
        json: Print JSON instead of a table.
    """
    if coverage:
        _print_coverage(coverage, json)
        return
    if model is None:
        raise NormPropError("No network to inspect.\nName one, or pass --coverage NAME ….")
    if samples < 2:
        raise NormPropError(f"--samples is {samples}.\nUse 2 or more.")
    kind = normalizer(norm)
    if data is None:
        shape, classes, x = (3, 32, 32), 10, None
    else:
        images = datasets.load(data)
        x = images.x_train[:samples].float()
        x = Standardize(InputStats.from_tensor(x)).eval()(x)
        shape, classes = tuple(x.shape[1:]), images.classes
    network = realize(models.build(model, shape=shape, classes=classes, norm=kind, width=width), kind, shape)
    report = inspect_model(network, x)
    if html is not None:
        report.save_html(html, log=log)
    if plot is not None:
        report.save_plot(plot)
    if json:
        print(report.to_json())
        return
    print(report.table())
    if report.worst is not None:
        print(f"\nFurthest off: {report.worst.path or report.worst.name}, by {report.worst.drift:.2f} octaves.")


def _print_coverage(names: tuple[str, ...], json: bool) -> None:
    from normprop.lab.coverage import coverage, table

    rows = coverage(names)
    print(dumps([row.to_dict() for row in rows]) if json else table(rows))
