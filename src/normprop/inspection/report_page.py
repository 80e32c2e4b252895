"""A report as one interactive HTML page that opens anywhere: nothing to fetch."""

from __future__ import annotations

import linecache
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from normprop.inspection.finding import Finding
from normprop.inspection.histogram import gaussian_shares
from normprop.inspection.row import Row
from normprop.inspection.viewer import assembled, embedded, libraries, part

_CHANNELS, _NUMBERS = (24, 256), 30_000  # of a row that a page holds, and about how many in all
_DIGITS = 4

# heading, class, what it is
_HEADER = (
    ("path", "", "module path"),
    ("operation", "", "class or function; hover for the line of code"),
    ("shape", "", "of the example run, batch first"),
    ("mean", "number", "predicted"),
    ("std", "number", "predicted"),
    ("mean (data)", "number", "measured"),
    ("std (data)", "number", "measured"),
    ("drift (data)", "number", "measured std over predicted, in octaves: rms over channels"),
    ("slope", "number", "E f′² · Var u / Var f of an activation"),
    ("growth", "number", "of a small change of the input, relative to the signal: √ of the sensitivity"),
    ("finding", "", "what to worry about"),
    ("≈", "", "rules that are approximations; hover for the reason"),
)


def page(title: str, verdict: str, findings: Sequence[Finding], rows: Sequence[Row], history: Any = None) -> str:
    """The page.

    Args:
        title: what was walked.
        verdict: the findings in words.
        findings: of the report.
        rows: of the report.
        history: of a probe's log, see `history_of`.
    """
    summaries = [row.to_dict() for row in rows]
    by_name: dict[str, list[Finding]] = {}
    for finding in findings:
        by_name.setdefault(finding.name, []).append(finding)
    most = min(max(_NUMBERS // max(1, len(rows)), _CHANNELS[0]), _CHANNELS[1])
    rules = list(dict.fromkeys(row.rule for row in rows))
    measured = any(row.measured is not None for row in rows)
    details = [_details(row, most) | {"rule": rules.index(row.rule)} for row in rows]
    data = {
        "title": title,
        "findings": [_finite(finding.to_dict()) for finding in findings],
        "rows": _finite([a | b for a, b in zip(summaries, details, strict=True)]),
        "rules": rules,
        "gaussian": _rounded(gaussian_shares()),
        "history": _finite(history),
    }
    return assembled(
        part("report.html"),
        {
            "title": escape(title),
            "style": part("viewer.css"),
            "findings": _list(verdict, findings),
            "summary": escape(_summary(rows)),
            "head": "".join(
                f'<th class="{kind}" title="{escape(hint)}"><button type="button">{escape(name)}</button></th>'
                for name, kind, hint in _HEADER
                if measured or "(data)" not in name
            ),
            "rows": "\n".join(_line(summary, by_name.get(summary["name"], ()), measured) for summary in summaries),
            "data": embedded(data),
            "libraries": libraries(),
            "graph": part("graph.js"),
            "report": part("report.js"),
        },
    )


def _list(verdict: str, findings: Sequence[Finding]) -> str:
    if not findings:
        return f'<li><span class="badge good">healthy</span>{escape(verdict)}</li>'
    return "\n".join(
        f'<li><span class="badge {f.severity}">{f.severity}</span>'
        f'<button type="button" data-name="{escape(f.name)}">{escape(f.sentence)}</button></li>'
        for f in findings
    )


def _summary(rows: Sequence[Row]) -> str:
    approximate = sum(row.standing == "approximate" for row in rows)
    text = f"{len(rows)} operations, {approximate} of them by an approximate rule."
    drifts = [(row.drift, row.place) for row in rows if row.drift is not None]
    if drifts:
        worst, where = max(drifts)
        text += f" The standard deviation is furthest from its prediction at {where}: {worst:.2f} octaves."
    return text


def _line(row: Mapping[str, Any], findings: Sequence[Finding], measured: bool) -> str:
    predicted, found = row["predicted"], row["measured"] or {}
    growth = math.sqrt(row["sensitivity"]) if row["sensitivity"] >= 0 else None
    on_data = (found.get("mean"), found.get("std"), row["drift"]) if measured else ()
    numbers = (predicted["mean"], predicted["std"], *on_data, row["slope"], growth)
    mark = "≈" if row["standing"] == "approximate" else ""
    return (
        f'<tr tabindex="0" data-name="{escape(row["name"])}"><td class="place">{escape(row["path"] or row["name"])}</td>'
        f'<td title="{escape(row["source"])}">{escape(row["operation"])}</td>'
        f"<td>{escape(' × '.join(map(str, row['shape'])))}</td>{''.join(map(_cell, numbers))}"
        f"<td>{escape(', '.join(finding.kind for finding in findings))}</td>"
        f'<td title="{escape(row["reason"])}">{mark}</td></tr>'
    )


def _cell(value: float | None) -> str:
    shown, exact = ("", "") if value is None else (f"{value:.3g}", f"{value:.6g}")
    return f'<td class="number" data-value="{exact}">{shown}</td>'


def _details(row: Row, most: int) -> dict[str, Any]:
    """What the page shows of one row beside its summary."""
    file, _, line = row.source.rpartition(":")
    histogram = row.histogram
    return {
        "code": linecache.getline(file, int(line)).strip() if line.isdigit() else "",
        "channels": {
            f"{kind}_{key}": values
            for kind in ("predicted", "measured")
            if (moments := getattr(row, kind)) is not None
            for key, values in (("mean", _some(moments.mean, most)), ("std", _some(moments.std, most)))
        },
        "channel_count": row.known.mean.numel(),
        "histogram": histogram and {"shares": _rounded(histogram.shares), "distance": histogram.distance},
    }


def _some(tensor: Tensor, most: int) -> list[float]:
    """Values of at most so many channels, evenly chosen."""
    values = tensor.detach().flatten().double().cpu()
    places = torch.linspace(0, len(values) - 1, min(len(values), most)).round().long()
    return _rounded(values[places].tolist())


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list) else value
