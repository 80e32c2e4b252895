"""What a walk found, one row an operation."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.inspection.report_page import page


@dataclass(frozen=True, eq=False)
class Row:
    """Moments of one operation's output.

    Attributes:
        name: of the node in the traced graph, unique.
        path: module path; of the module it calls, or whose forward it stands in.
        operation: class or function.
        standing: "exact" or "approximate", as its rule says; "input" for an input.
        reason: why it is approximate.
        source: ``file:line`` of the model's code.
        shape: of the tensor in the example run, batch first.
        predicted: mean and variance.
        slope: for an activation ``E f'² · Var u / Var f``, averaged over channels: how much more a small change of its input
            grows than the signal does; else None.
        sensitivity: product of the slopes along the paths from the input, each path weighted by the variance it carries:
            a change of the input, relative to the signal, is √sensitivity times larger here, and so are gradients on the
            way back.
        measured: mean and variance on data, if there was any.
    """

    name: str
    path: str
    operation: str
    standing: str
    reason: str
    source: str
    shape: tuple[int, ...]
    predicted: Moments
    slope: float | None = None
    sensitivity: float = 1.0
    measured: Moments | None = None

    @property
    def drift(self) -> float | None:
        """``log₂`` of measured over predicted standard deviation, rms over channels: octaves. None where either is zero."""
        if self.measured is None:
            return None
        both = (self.predicted.std > 0) & (self.measured.std > 0)
        ratios = (self.measured.std / self.predicted.std)[both]
        return _number(ratios.log2().square().mean().sqrt()) if ratios.numel() else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; moments pooled over channels."""
        result = {k: getattr(self, k) for k in ("name", "path", "operation", "standing", "reason", "source")}
        result |= {"shape": list(self.shape), "slope": self.slope, "sensitivity": self.sensitivity, "drift": self.drift}
        for kind in ("predicted", "measured"):
            moments: Moments | None = getattr(self, kind)
            result[kind] = None if moments is None else _summary(moments)
        return result


def _summary(moments: Moments) -> dict[str, float]:
    pooled = moments.pooled(list(range(moments.mean.dim())))
    return {
        "mean": _number(pooled.mean),
        "std": _number(pooled.std),
        "rms_of_channel_means": _number(moments.mean.square().mean().sqrt()),
        "mean_channel_var": _number(moments.var.mean()),
    }


def _number(tensor: Tensor) -> float:
    return float(tensor.detach().reshape(()))


def _write(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except (OSError, ValueError) as error:
        raise NormPropError(f"{path} cannot be written: {error}.\nName a file in a folder that exists.") from error


class Report(Sequence[Row]):
    """The rows of a walk in the order of the graph.

    Args:
        rows: one an operation.
        title: what was walked.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> report = normprop.propagate(net)
        >>> report[-1].operation, round(report[-1].slope, 2)
        ('ReLU', 1.47)
    """

    def __init__(self, rows: Sequence[Row], title: str = "") -> None:
        self.rows = tuple(rows)
        self.title = title

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def approximate(self) -> tuple[Row, ...]:
        """Rows whose rule is an approximation."""
        return tuple(row for row in self.rows if row.standing == "approximate")

    @property
    def worst(self) -> Row | None:
        """The row whose standard deviation has drifted furthest from its prediction; None if nothing was measured."""
        return max((row for row in self.rows if row.drift is not None), key=lambda row: row.drift or 0.0, default=None)

    def with_measured(self, measured: dict[str, Moments]) -> Report:
        """The same rows with measured moments by name."""
        return Report([replace(row, measured=measured.get(row.name)) for row in self.rows], self.title)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {"title": self.title, "rows": [row.to_dict() for row in self.rows]}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def to_html(self) -> str:
        """One page that needs nothing else: a row an operation, coloured by how far what was measured has drifted."""
        return page(self.title, [row.to_dict() for row in self.rows])

    def save_html(self, path: str | Path) -> None:
        """Write `to_html` to a file.

        Raises:
            NormPropError: the file cannot be written.
        """
        _write(Path(path), lambda: Path(path).write_text(self.to_html(), encoding="utf-8"))

    def plot(self) -> Any:
        """A matplotlib `Figure`: standard deviation, mean and the growth of a small change over the depth.

        Raises:
            NormPropError: matplotlib is not installed.
        """
        try:
            depth = importlib.import_module("normprop.inspection.depth_figure")
        except ModuleNotFoundError as error:
            raise NormPropError("a plot needs matplotlib.\nInstall it with pip install 'normprop[plot]'.") from error
        return depth.plot_report(self)

    def save_plot(self, path: str | Path) -> None:
        """Write `plot` to a file; its ending says in which format.

        Raises:
            NormPropError: the file cannot be written, the format is unknown, or matplotlib is not installed.
        """
        figure = self.plot()
        _write(Path(path), lambda: figure.savefig(path))

    def table(self) -> str:
        """A table for a terminal: a line an operation, predicted and measured mean and standard deviation."""
        measured = any(row.measured is not None for row in self.rows)
        header = [
            "path",
            "operation",
            "mean",
            "std",
            *(["mean", "std (data)"] if measured else []),
            "slope",
            "sens.",
            "",
        ]
        lines = [header]
        for row in self.rows:
            predicted = _summary(row.predicted)
            cells = [row.path or row.name, row.operation, f"{predicted['mean']:.3f}", f"{predicted['std']:.3f}"]
            if measured:
                found = None if row.measured is None else _summary(row.measured)
                cells += ["", ""] if found is None else [f"{found['mean']:.3f}", f"{found['std']:.3f}"]
            cells += [f"{row.slope:.3f}" if row.slope is not None else "", f"{row.sensitivity:.3g}"]
            lines.append([*cells, "≈" if row.standing == "approximate" else ""])
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
                for line in lines]  # fmt: skip
        text.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(line.rstrip() for line in text)
