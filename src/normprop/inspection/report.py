"""What a walk found: a row an operation, and what to worry about."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normprop.channel_moments import Moments
from normprop.errors import NormPropError
from normprop.inspection.diagnosis import diagnose
from normprop.inspection.finding import Finding
from normprop.inspection.histogram import Histogram
from normprop.inspection.node_data import Value, node_data
from normprop.inspection.probe_log import Log, history_of
from normprop.inspection.report_page import page
from normprop.inspection.row import Row

if TYPE_CHECKING:  # its import takes a second
    from torch.export import ExportedProgram


def _write(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except (OSError, ValueError) as error:
        raise NormPropError(f"{path} cannot be written: {error}.\nName a file in a folder that exists.") from error


class Report(Sequence[Row]):
    """The rows of a walk in the order of the operations.

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

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What a user should worry about, the gravest first: nothing, if there is nothing.

        Example:
            >>> import torch, normprop
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> with torch.no_grad():
            ...     _ = net[2].weight.mul_(40)
            >>> [(finding.kind, finding.path) for finding in normprop.propagate(net).findings]
            [('jump', '2')]
        """
        return diagnose(self.rows)

    def verdict(self) -> str:
        """The findings as text, one a line."""
        if self.findings:
            return "\n".join(str(finding) for finding in self.findings)
        measured = any(row.measured is not None for row in self.rows)
        return f"Nothing to worry about in {len(self.rows)} operations" + (
            ", measured on data." if measured else ", by prediction alone."
        )

    @property
    def worst(self) -> Row | None:
        """The row whose standard deviation has drifted furthest from its prediction; None if nothing was measured."""
        return max((row for row in self.rows if row.drift is not None), key=lambda row: row.drift or 0.0, default=None)

    def with_measured(self, measured: dict[str, Moments], histograms: dict[str, Histogram] | None = None) -> Report:
        """The same rows with measured moments, and histograms, by name."""
        found = histograms or {}
        rows = [replace(row, measured=measured.get(row.name), histogram=found.get(row.name)) for row in self.rows]
        return Report(rows, self.title)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        findings = [finding.to_dict() for finding in self.findings]
        return {"title": self.title, "findings": findings, "rows": [row.to_dict() for row in self.rows]}

    def to_json(self, *, overlay: ExportedProgram | None = None, value: Value = "std") -> str:
        """`to_dict` as JSON; or one number an operation, which Model Explorer lays over its graph of the exported network.

        Args:
            overlay: the same network, exported. Model Explorer (ai-edge-model-explorer) shows it, and takes the JSON as node
                data.
            value: which number: "std", "mean" (measured, else predicted) or "drift".

        Raises:
            NormPropError: another value, or an exported network in which no operation is found again.
        """
        if overlay is not None:
            return json.dumps(node_data(self.rows, overlay, value), indent=1)
        return json.dumps(self.to_dict(), indent=1)

    def to_html(self, log: Log | None = None) -> str:
        """One interactive page that needs nothing else: the verdict, the network as a graph, and a table.

        Nodes tell their moments when hovered and show, when clicked, channels, histogram, rule and line of code; blocks open
        and close.

        Args:
            log: of a `MomentProbe`, to be gone through by a slider: its file of JSON lines, or its dictionaries.

        Raises:
            NormPropError: the log cannot be read, or holds no step.
        """
        return page(self.title, self.verdict(), self.findings, self.rows, None if log is None else history_of(log))

    def save_html(self, path: str | Path, log: Log | None = None) -> None:
        """Write `to_html` to a file.

        Raises:
            NormPropError: the file cannot be written, or the log not read.
        """
        text = self.to_html(log)
        _write(Path(path), lambda: Path(path).write_text(text, encoding="utf-8"))

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
        """The verdict and a table, a line an operation, of predicted and measured mean and standard deviation."""
        measured = any(row.measured is not None for row in self.rows)
        data = ["mean (data)", "std (data)"] if measured else []
        lines = [["path", "operation", "mean", "std", *data, "slope", "sens.", ""]]
        for row in self.rows:
            values = row.to_dict()
            cells = [row.place, row.operation, *_pair(values["predicted"]), *(_pair(values["measured"]) if measured else [])]
            cells += [f"{row.slope:.3f}" if row.slope is not None else "", f"{row.sensitivity:.3g}"]
            lines.append([*cells, "≈" if row.standing == "approximate" else ""])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
                for line in lines]  # fmt: skip
        text.insert(1, "  ".join("-" * w for w in widths))
        return f"{self.verdict()}\n\n" + "\n".join(line.rstrip() for line in text)


def _pair(summary: dict[str, float] | None) -> list[str]:
    return ["", ""] if summary is None else [f"{summary['mean']:.3f}", f"{summary['std']:.3f}"]
