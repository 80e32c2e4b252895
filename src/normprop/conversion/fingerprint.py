"""What tells conversions apart that compute other functions of the same parameters."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normprop.conversion.entry import Entry
from normprop.conversion.initial_values import weighed
from normprop.conversion.lane import Lane
from normprop.conversion.program import written
from normprop.graph.node import Node
from normprop.sites.site import PRINTED


def set_fingerprints_(root: nn.Module, lane: Lane) -> None:
    """Write into every site by what moments it goes: those of its input when all parameters are certain numbers.

    Two conversions of one architecture may differ: a pool over the whole image divides by its size, rules may be the user's
    own. Numbers that a `state_dict` carries as bytes let `load_state_dict` refuse what belongs to another function.
    """
    by_site: dict[str, list[Entry]] = {}
    for entry in lane.all_entries():
        by_site.setdefault(entry.site, []).append(entry)
    entries = [entry for of in by_site.values() for entry in of]
    found = dict(zip((e.key for e in entries), _summaries(root, lane, entries), strict=True))
    with torch.no_grad():
        for path, own in by_site.items():
            site: Any = root.get_submodule(path)
            total = math.fsum((1 + entry.call) * found[entry.key] for entry in own)
            site.record[1:] = torch.tensor(_bytes(total))
            if lane.method == "paper":
                site.record[0] = PRINTED


def _summaries(root: nn.Module, lane: Lane, entries: Sequence[Entry]) -> list[float]:
    """A number per entry: a weighted mean of what the site's input has for mean and standard deviation."""
    nodes = [entry.moments for entry in entries if entry.moments is not None]
    if not nodes or next(root.parameters()).is_meta:
        return [0.0] * len(entries)
    with torch.no_grad():
        values = iter(written(nodes, root).function(_with_certain_numbers(root, lane, nodes)))
    return [0.0 if entry.moments is None else _summary(next(values)) for entry in entries]


def _summary(moments: Any) -> float:
    found = weighed(torch.cat([moments.mean.flatten(), 2.0 * moments.std.flatten()]))
    return found if math.isfinite(found) else 0.0


def _with_certain_numbers(root: nn.Module, lane: Lane, nodes: Sequence[Node]) -> nn.Module:
    """A copy of the network on the CPU in float64, whose parameters have numbers that follow from their names."""
    wanted = _read(root, nodes)
    memo: dict[int, Any] = {id(lane): lane}
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        made = _certain(name, tensor) if name in wanted else torch.empty(0)
        memo[id(tensor)] = nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(root, memo)


def _read(root: nn.Module, nodes: Sequence[Node]) -> set[str]:
    """Names of the parameters and buffers that some nodes are made of."""
    found: set[str] = set()
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(node.inputs)
        if node.op == "tensor":
            found.add(node.target)
        elif node.op == "module":
            module = root.get_submodule(node.target)
            names = (name for name, _ in (*module.named_parameters(), *module.named_buffers()))
            found |= {f"{node.target}.{name}" for name in names}
    return found


def _certain(name: str, tensor: Tensor) -> Tensor:
    """Numbers between ½ and 1 for vectors, those of a layer at its start for matrices; integers as they are."""
    if not tensor.is_floating_point():
        return tensor.detach().cpu()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    numbers = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return 0.5 + 0.5 * numbers if tensor.dim() < 2 else (2.0 * numbers - 1.0) * (3.0 / tensor[0].numel()) ** 0.5


def _bytes(number: float) -> list[float]:
    """A number squeezed between 0 and 1, in four digits to the base 256: each of them has room in any dtype."""
    whole = round((0.5 + 0.5 * number / (1.0 + abs(number))) * (256**4 - 1))
    return [float(whole >> shift & 255) for shift in (24, 16, 8, 0)]
