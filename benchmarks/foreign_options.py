"""Convert networks of other libraries with `normalize="all"`, `method="paper"` and rules of one's own.

    python benchmarks/foreign_options.py    # after benchmarks/foreign.py; continues where it was stopped

Every network that passed foreign.py is converted with each, the first two fresh and the last one with its function kept.
It counts as passed if a sample's output does not depend on the others and a training step on one sample has finite
gradients (and, with rules, the function is the original's), as refused if `convert` says so by an error of the library;
all else is wrong. Rules of one's own are those that the library has, called through a function that counts. Writes
benchmarks/results/foreign_options.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from foreign import RESULTS as KNOWN
from foreign import attempt, distance, mapped, outputs_of, randomise, run, step

RESULTS = Path(__file__).resolve().parent / "results" / "foreign_options.json"
OPTIONS = ("normalize=all", "method=paper", "rules")


def work(name: str) -> dict[str, Any]:
    """What each option makes of one network."""
    import torch
    from foreign_networks import build

    torch.set_num_threads(1)
    model, example = build(name)
    arguments = example if isinstance(example, tuple) else (example,)
    randomise(model.eval(), 1)
    return {"name": name} | {option: outcome(option, model, arguments) for option in OPTIONS}


def outcome(option: str, model: Any, arguments: Any) -> str:
    """ "passed", "refused: why", or "wrong: what"."""
    from normprop import NormPropError

    try:
        fresh(option, model, arguments) if option != "rules" else with_rules(model, arguments)
    except NormPropError as error:
        return f"refused: {' '.join(str(error).splitlines()[:2])[:200]}"
    except Exception as error:  # whatever is raised is what this reports
        return f"wrong: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return "passed"


def fresh(option: str, model: Any, arguments: Any) -> None:
    """Converted afresh: samples are independent, and one of them trains."""
    import torch

    import normprop

    key, value = option.split("=")
    converted = normprop.convert(model, example=arguments, preserve=False, **{key: value})
    with torch.no_grad():
        together, alone = outputs_of(converted, arguments), outputs_of(converted, mapped(arguments, lambda t: t[:1]))
    pairs = [(a, k) for a, k in zip(alone, together, strict=True) if k.dim() and len(k) == 2 and len(a) == 1]
    assert all(bool(k.isfinite().all()) for _, k in pairs), "outputs aren't finite"
    apart = distance([a for a, _ in pairs], [k[:1] for _, k in pairs]) if pairs else 0.0
    assert apart <= 1e-8, f"{apart:.1e} from its output in a batch"
    step(converted, arguments, {})


def with_rules(model: Any, arguments: Any) -> None:
    """With the library's own rules for rectifiers, means and maxima, handed over as the user's."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from normprop.rules import TABLE
    from normprop.rules.table import Rule

    called: Counter[str] = Counter()

    def counted(key: Any, rule: Rule) -> Rule:
        def function(*args: Any, **kwargs: Any) -> Any:
            called[str(key)] += 1
            return rule.function(*args, **kwargs)

        return dataclasses.replace(rule, function=function)

    own = {nn.ReLU: TABLE.for_module(nn.ReLU()), nn.MaxPool2d: TABLE.for_module(nn.MaxPool2d(2))}
    own |= {f: TABLE.for_function(f) for f in (F.relu, torch.relu, "relu", "mean", torch.mean)}
    rules = {key: counted(key, rule) for key, rule in own.items() if rule is not None}
    attempt(model, arguments, {}, rules=rules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--retry", action="store_true", help="run again what was wrong")
    options = parser.parse_args()
    if options.work:
        for name in options.work:
            print(json.dumps(work(name)), flush=True)
        return
    ran = [row for row in json.loads(KNOWN.read_text()) if row.get("norms") and not row["stage"]]
    rows = {row["name"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    right = lambda name: name in rows and not (options.retry and "wrong" in json.dumps(rows[name]))
    wanted = [row["name"] for row in sorted(ran, key=lambda row: row.get("seconds", 1e3)) if options.only in row["name"]]
    for row in run([name for name in wanted if not right(name)], __file__):
        rows[row["name"]] = (
            row if "error" not in row else {"name": row["name"], **dict.fromkeys(OPTIONS, f"wrong: {row['error']}")}
        )
        print(json.dumps(rows[row["name"]]), flush=True)
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(rows[n]) for n in sorted(rows)) + "\n]\n")
    for option in OPTIONS:
        print(option, dict(Counter(row[option].partition(":")[0] for row in rows.values())))


if __name__ == "__main__":
    main()
