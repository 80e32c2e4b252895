"""A report as one HTML page that opens anywhere: no scripts, no fonts, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #fff; text-align: left; border-bottom: 2px solid #888; }
th, td { padding: 2px 10px; white-space: nowrap; }
td.number, th.number { text-align: right; }
tr:hover td { outline: 1px solid #bbb; }
td.place { font-family: ui-monospace, monospace; }
.key span { padding: 1px 10px; }
"""

_HEADER = (
    ("path", "", "module path"),
    ("operation", "", "class or function; hover for the line of code"),
    ("shape", "", "of the example run, batch first"),
    ("mean", "number", "predicted"),
    ("std", "number", "predicted"),
    ("mean (data)", "number", "measured on data"),
    ("std (data)", "number", "measured on data"),
    ("drift", "number", "measured std over predicted, in octaves: rms over channels"),
    ("slope", "number", "E f′² · Var u / Var f of an activation"),
    ("growth", "number", "of a small change of the input, relative to the signal: √ of the sensitivity"),
    ("", "", "≈ marks rules that are approximations; hover for the reason"),
)
_STEPS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def page(title: str, verdict: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        title: what was walked.
        verdict: what to worry about, a line each.
        rows: as `Row.to_dict` gives them.
    """
    measured = any(row["measured"] is not None for row in rows)
    kept = [h for h in _HEADER if measured or (h[2] != "measured on data" and h[0] != "drift")]
    head = "".join(f'<th class="{kind}" title="{escape(hint)}">{escape(name)}</th>' for name, kind, hint in kept)
    body = "\n".join(_row(row, measured) for row in rows)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}: moments</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "".join(f"<p>{escape(line)}</p>\n" for line in verdict.splitlines())
        + f"<p>{escape(_summary(rows, measured))}</p>\n{_key() if measured else ''}"
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</body>\n</html>\n"
    )


def colour(octaves: float) -> str:
    """Blue where the signal is smaller than predicted, red where it is larger, white where it is as predicted.

    >>> colour(0.0), colour(-9.0), colour(9.0)
    ('#ffffff', '#5b9bd5', '#e8775a')
    """
    end = (0x5B, 0x9B, 0xD5) if octaves < 0 else (0xE8, 0x77, 0x5A)
    share = min(abs(octaves) / _STEPS[-1], 1.0)
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in end)


def _summary(rows: Sequence[Mapping[str, Any]], measured: bool) -> str:
    approximate = sum(row["standing"] == "approximate" for row in rows)
    text = f"{len(rows)} operations, {approximate} of them by an approximate rule."
    drifts = [(row["drift"], row["path"] or row["name"]) for row in rows if row["drift"] is not None]
    if measured and drifts:
        worst, where = max(drifts)
        text += f" The standard deviation is furthest from its prediction at {where}: {worst:.2f} octaves."
    return text


def _key() -> str:
    cells = "".join(f'<span style="background:{colour(s)}">{2**s:.2g}×</span>' for s in _STEPS)
    return f'<p class="key">measured std over predicted: {cells}</p>\n'


def _row(row: Mapping[str, Any], measured: bool) -> str:
    predicted, found = row["predicted"], row["measured"]
    cells = [
        f'<td class="place">{escape(row["path"] or row["name"])}</td>',
        f'<td title="{escape(row["source"])}">{escape(row["operation"])}</td>',
        f"<td>{escape(' × '.join(map(str, row['shape'])))}</td>",
        _number(predicted["mean"]),
        _number(predicted["std"]),
    ]
    if measured:
        ratio = None if found is None else _octaves(found["std"], predicted["std"])
        style = "" if ratio is None else f' style="background:{colour(ratio)}"'
        cells.append(_number(None if found is None else found["mean"]))
        cells += [_number(None if found is None else found["std"], style), _number(row["drift"], style, ".2f")]
    cells += [_number(row["slope"]), _number(math.sqrt(row["sensitivity"]) if row["sensitivity"] >= 0 else None)]
    mark = "≈" if row["standing"] == "approximate" else ""
    return f'<tr>{"".join(cells)}<td title="{escape(row["reason"])}">{mark}</td></tr>'


def _octaves(measured: float, predicted: float) -> float | None:
    return math.log2(measured / predicted) if measured > 0 and predicted > 0 else None


def _number(value: float | None, style: str = "", form: str = ".3g") -> str:
    return f'<td class="number"{style}>{"" if value is None else format(value, form)}</td>'
