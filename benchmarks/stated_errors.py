"""Search for functions whose moments are further off than `moments` states, against mpmath.

    python benchmarks/stated_errors.py 0 3000    # numbers of the draws; continues where it was stopped

A draw is a function of a function, ``f(a g(b (u − c)) + d)``, with a third one added to some: kinks, jumps, spikes of a
width down to 1e-5 standard deviations, waves of up to five periods in one, at mean and std between 1e-2 and 1e2. Counts go
to benchmarks/results/stated_errors.json. Hypothesis searches closed forms in the suite (tests/test_stated_errors.py).
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import torch
from mpmath import mp, mpf

import normprop

RESULTS = Path(__file__).resolve().parent / "results" / "stated_errors.json"
CHUNK = 100
mp.dps = 25
NODES = 36


@dataclass(frozen=True)
class Curve:
    """A function of one number.

    Attributes:
        torch: for tensors.
        exact: for numbers of mpmath.
        bends: where it isn't smooth.
        waves: whether it never ends to oscillate.
    """

    torch: Callable[[torch.Tensor], torch.Tensor]
    exact: Callable[[Any], Any]
    bends: tuple[float, ...] = ()
    waves: bool = False


def _softplus(x: Any) -> Any:
    return x + mp.log1p(mp.exp(-x)) if x > 0 else mp.log1p(mp.exp(x))


CURVES = {
    "tanh": Curve(torch.tanh, mp.tanh),
    "sigmoid": Curve(torch.sigmoid, lambda x: 1 / (1 + mp.exp(-x))),
    "softplus": Curve(lambda x: torch.logaddexp(x, torch.zeros_like(x)), _softplus),
    "gelu": Curve(lambda x: x * torch.special.ndtr(x), lambda x: x * mp.erfc(-x / mp.sqrt(2)) / 2),
    "silu": Curve(torch.nn.functional.silu, lambda x: x / (1 + mp.exp(-x))),
    "bell": Curve(lambda x: torch.exp(-x * x), lambda x: mp.exp(-x * x)),
    "resonance": Curve(lambda x: 1 / (1 + x * x), lambda x: 1 / (1 + x * x)),
    "asinh": Curve(torch.asinh, mp.asinh),
    "square": Curve(torch.square, lambda x: x * x),
    "sin": Curve(torch.sin, mp.sin, waves=True),
    "cos": Curve(torch.cos, mp.cos, waves=True),
    "relu": Curve(torch.relu, lambda x: x if x > 0 else mpf(0), (0.0,)),
    "abs": Curve(torch.abs, abs, (0.0,)),
    "sign": Curve(torch.sign, mp.sign, (0.0,)),
    "step": Curve(lambda x: (x > 0).to(x), lambda x: mpf(x > 0), (0.0,)),
    "clamp": Curve(lambda x: x.clamp(-1.0, 1.0), lambda x: max(min(x, mpf(1)), mpf(-1)), (-1.0, 1.0)),
    "hardswish": Curve(
        torch.nn.functional.hardswish, lambda x: x * max(min(x + 3, mpf(6)), mpf(0)) / 6, (-3.0, 3.0)
    ),
    "elu": Curve(torch.nn.functional.elu, lambda x: x if x > 0 else mp.expm1(x), (0.0,)),
    "softsign": Curve(torch.nn.functional.softsign, lambda x: x / (1 + abs(x)), (0.0,)),
    "pulse": Curve(
        lambda x: ((x > -1) & (x < 1)).to(x), lambda x: mpf(-1 < x < 1), (-1.0, 1.0)
    ),
}  # fmt: skip


@dataclass
class Draw:
    """A function and where it is taken: ``f(a g(b (u − c)) + d) + e h(k (u − l))`` for u ~ N(mean, std²)."""

    outer: Curve
    inner: Curve
    added: Curve | None
    numbers: tuple[float, ...]  # a, b, c, d, e, k, l
    mean: float
    std: float
    text: str

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        a, b, c, d, e, k, place = self.numbers
        y = self.outer.torch(a * self.inner.torch(b * (u - c)) + d)
        return y if self.added is None else y + e * self.added.torch(k * (u - place))

    def exact(self, u: Any) -> Any:
        a, b, c, d, e, k, place = (mpf(n) for n in self.numbers)
        y = self.outer.exact(a * self.inner.exact(b * (u - c)) + d)
        return y if self.added is None else y + e * self.added.exact(k * (u - place))

    def places(self) -> list[Any]:
        """Where the function bends or is steep, and what lies between is smooth."""
        a, b, c, d, _, k, place = (mpf(n) for n in self.numbers)
        found = [c + mpf(x) / b for x in (0.0, *self.inner.bends)]
        if self.added is not None:
            found += [place + mpf(x) / k for x in (0.0, *self.added.bends)]
        levels = [(mpf(level) - d) / a for level in (0.0, *self.outer.bends)]
        return found + [c + x / b for level in levels for x in _reached(self.inner, level)]


def _reached(curve: Curve, level: Any) -> list[Any]:
    """Where a curve passes a level, found on a fine grid and by halving."""
    f = lambda x: curve.exact(x) - level
    sizes = [mpf(10) ** (mpf(i) / 12) for i in range(-60, 85)]
    grid = [-x for x in reversed(sizes)] + [mpf(0), *sizes]
    if curve.waves:
        grid = sorted([*grid, *(mpf(i) / 4 for i in range(-2400, 2401))])
    values = [f(x) for x in grid]
    found = []
    for low, high, y, z in zip(grid[:-1], grid[1:], values[:-1], values[1:], strict=True):
        if y == 0:
            found.append(low)
        elif y * z < 0:
            for _ in range(90):
                middle = (low + high) / 2
                low, high = (middle, high) if f(middle) * y > 0 else (low, middle)
            found.append(low)
    return found


def draw(seed: int) -> Draw:
    """The function of a number."""
    rng = random.Random(seed)
    names = [rng.choice(list(CURVES)) for _ in range(3)]
    outer, inner, added = (CURVES[n] for n in names)
    mean, std = rng.uniform(-3, 3) * 10 ** rng.uniform(-1, 1.5), 10 ** rng.uniform(-2, 2)
    steep = lambda curve: 10 ** rng.uniform(-1, 1.4 if curve.waves else 5 if rng.random() < 0.5 else 1) / std
    a, b, k = rng.choice((-1, 1)) * 10 ** rng.uniform(-1, 1), steep(inner), steep(added)
    c, place = mean + rng.uniform(-3, 3) * std, mean + rng.uniform(-3, 3) * std
    numbers = (a, b, c, rng.uniform(-2, 2), rng.uniform(-2, 2), k, place)
    if (
        outer.waves
        and not inner.waves
        and names[1] in ("square", "relu", "abs", "silu", "gelu", "elu", "hardswish", "softplus")
    ):
        numbers = (a, min(b, 3 / std), *numbers[2:])  # waves as fast as the oracle can follow
    third = added if rng.random() < 0.4 else None
    text = f"{names[0]}({numbers[0]:.4g} {names[1]}({numbers[1]:.6g} (u - {numbers[2]:.6g})) + {numbers[3]:.4g})"
    text += f" + {numbers[4]:.4g} {names[2]}({k:.6g} (u - {place:.6g}))" if third is not None else ""
    return Draw(outer, inner, third, numbers, mean, std, f"{text} at {mean:.6g}, {std:.6g}")


def integrals(drawn: Draw) -> tuple[Any, Any]:
    """E f and E f² by Gauss-Legendre panels that shrink towards every place."""
    mean, std = mpf(drawn.mean), mpf(drawn.std)
    low, high = mean - 12 * std, mean + 12 * std
    places = [p for p in drawn.places() if low < p < high]
    ends = {low, high, *places, *(mean + std * i / 5 for i in range(-60, 61))}
    if len(places) < 40:
        for place in places:
            ends.update(place + sign * std * mpf(3) ** -i for i in range(-2, 18) for sign in (-1, 1))
    line = sorted(e for e in ends if low <= e <= high)
    first = second = mpf(0)
    for start, end in itertools.pairwise(line):
        half, middle = (end - start) / 2, (end + start) / 2
        for x, weight in LEGENDRE:
            u = middle + half * x
            y = drawn.exact(u)
            share = weight * half * mp.npdf((u - mean) / std) / std
            first += share * y
            second += share * y * y
    return first, second


def _legendre(count: int) -> list[tuple[Any, Any]]:
    """Nodes and weights, by Newton's method."""
    found = []
    for i in range(1, count + 1):
        x = mpmath.cos(mp.pi * (i - mpf(1) / 4) / (count + mpf(1) / 2))
        for _ in range(8):
            before, value = mpf(1), x
            for n in range(2, count + 1):
                before, value = value, ((2 * n - 1) * x * value - (n - 1) * before) / n
            slope = count * (x * value - before) / (x * x - 1)
            x -= value / slope
        found.append((x, 2 / ((1 - x * x) * slope * slope)))
    return found


LEGENDRE = _legendre(NODES)


def attempt(seed: int) -> tuple[str, float]:
    """Of the differences of mean, second moment and variance from the exact ones the largest, in stated errors."""
    drawn = draw(seed)
    found = normprop.moments(
        drawn, torch.tensor(drawn.mean, dtype=torch.float64), torch.tensor(drawn.std, dtype=torch.float64)
    )
    first, second = integrals(drawn)
    off = [mpf(found.mean.item()) - first, mpf(found.second.item()) - second, mpf(found.var.item()) - (second - first**2)]
    error = mpf(found.error.item()) + mpf(10) ** -15 * (1 + abs(first) + second)  # of the oracle
    return drawn.text, float(max(abs(x) for x in off) / error)


def main(first: int, end: int) -> None:
    rows = {row["first"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for start in range(first, end, CHUNK):
        if start in rows:
            continue
        ratios: list[float] = []
        wrong: dict[str, str] = {}
        for seed in range(start, start + CHUNK):
            text, ratio = attempt(seed)
            ratios.append(ratio)
            if not ratio <= 1.0:
                wrong[str(seed)] = f"{ratio:.2g} stated errors: {text}"
                print(seed, wrong[str(seed)], flush=True)
        rows[start] = {"first": start, "draws": CHUNK, "largest": max(ratios), "wrong": wrong}
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(rows[n]) for n in sorted(rows)) + "\n]\n")
    count, wrong_ones = sum(row["draws"] for row in rows.values()), sum(len(row["wrong"]) for row in rows.values())
    print(
        f"{count} draws, {wrong_ones} further off than stated; at most {max(r['largest'] for r in rows.values()):.2g} of it"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
