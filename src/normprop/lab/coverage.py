"""Which networks of a library can be converted, found without weights, memory or data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normprop.conversion.conversion import convert
from normprop.conversion.site_plan import nodes_behind, plan_sites
from normprop.errors import NormPropError, TracingError, UnsupportedOpError
from normprop.graph.preparation import prepare


@dataclass(frozen=True)
class Coverage:
    """What became of one network.

    Attributes:
        name: ``torchvision:NAME`` or ``timm:NAME``.
        norms: number of BatchNorm modules; nothing else is looked at if there is none.
        traced: its forward was recorded, on an input that was found.
        converted: `convert` gave it sites, and the result runs and gives the shape that it should.
        after_linear: sites that rewrite the weight of the layer before them.
        affine: sites that scale and shift what they normalise.
        approximate: operations in front of some site whose rule is an approximation.
        missing: operations in front of some site without a rule.
        error: first line of what went wrong.
        seconds: for all of this.
    """

    name: str
    norms: int = 0
    traced: bool = False
    converted: bool = False
    after_linear: int = 0
    affine: int = 0
    approximate: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    error: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return asdict(self)


def coverage(names: Iterable[str]) -> list[Coverage]:
    """Try to convert networks by name, built on the meta device without weights.

    Args:
        names: ``torchvision:NAME`` or ``timm:NAME``.

    Returns:
        A row a name. A network that fails is a row with its reason, never an exception.

    Raises:
        NormPropError: a name of neither library.
    """
    return [_cover(name) for name in names]


def _cover(name: str) -> Coverage:
    start = time.perf_counter()
    row: dict[str, Any] = {}
    try:
        model = build(name)
        row["norms"] = sum(isinstance(m, _NormBase) for m in model.modules())
        if row["norms"]:
            _convert(model, row)
    except UnsupportedOpError as error:
        row |= {"traced": True, "missing": error.operations, "error": _first_line(error)}
    except Exception as error:  # whatever a foreign model raises is what this reports
        traced = row.get("traced", not isinstance(error, TracingError))
        row |= {"traced": traced, "error": f"{type(error).__name__}: {_first_line(error)}"}
    return Coverage(name=name, seconds=round(time.perf_counter() - start, 2), **row)


def _convert(model: nn.Module, row: dict[str, Any]) -> None:
    walk = prepare(model, training=False)
    row["traced"] = True
    plans = plan_sites(walk, "batchnorm", center=False)
    needed = nodes_behind(walk, plans, plans)
    walk.require(needed)
    approximate = {walk.operation(n) for n in needed & walk.rules.keys() if walk.standing(n)[0] == "approximate"}
    row["approximate"] = tuple(sorted(approximate))
    row["after_linear"] = sum(plan.layer is not None for plan in plans)
    row["affine"] = len(plans) - row["after_linear"]
    inputs = walk.example
    converted = convert(model, preserve=False)
    with torch.no_grad(), torch.device("meta"):
        before, after = (_shapes(m(*inputs.args, **inputs.kwargs)) for m in (model, converted))
    if before != after:
        raise NormPropError(f"the converted network gives {after}, the original {before}.")
    row["converted"] = True


def build(name: str) -> nn.Module:
    """The network of that name on the meta device, in eval mode.

    Raises:
        NormPropError: the name is not ``torchvision:NAME`` or ``timm:NAME``.
    """
    library, _, model_name = name.partition(":")
    with torch.device("meta"):
        if library == "torchvision":
            import torchvision

            model: nn.Module = torchvision.models.get_model(model_name, weights=None)
        elif library == "timm":
            import timm

            model = timm.create_model(model_name, pretrained=False)
        else:
            raise NormPropError(f"{name!r} names no network.\nUse torchvision:NAME or timm:NAME.")
    return model.eval()


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {k: _shapes(v) for k, v in value.items()}
    return [_shapes(v) for v in value] if isinstance(value, tuple | list) else value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def table(rows: Sequence[Coverage]) -> str:
    """A Markdown table, a row a network, with the total below it."""
    lines = [
        "| network | BatchNorms | converted | sites after a layer | affine sites | approximate rules | not covered |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = "yes" if row.converted else "no" if row.norms else "no BatchNorm"
        reason = ", ".join(row.missing) or row.error
        cells = (row.name, row.norms, verdict, row.after_linear, row.affine, ", ".join(row.approximate), reason)
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", summary(rows)])


def summary(rows: Sequence[Coverage]) -> str:
    """One sentence: how many of the networks with a BatchNorm that could be recorded are converted."""
    held = [row for row in rows if row.norms]
    traced = [row for row in held if row.traced]
    done = sum(row.converted for row in traced)
    share = f" ({100 * done / len(traced):.1f} %)" if traced else ""
    return (
        f"{len(held)} of {len(rows)} networks hold a BatchNorm; {len(traced)} of them were recorded, "
        f"of which {done}{share} are converted."
    )
