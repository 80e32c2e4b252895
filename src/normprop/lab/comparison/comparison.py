"""What the finished runs of a grid show: each normaliser at its own best rate, and how many rates are good."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normprop.lab.comparison.records import Record
from normprop.lab.networks.normalizers import NORMALIZERS
from normprop.lab.pages.spread import spread
from normprop.lab.training.recipe import Recipe, clip_at, rate_at

# A rate trains if it reaches this share of the best validation accuracy.
TRAINS = 0.8


@dataclass(frozen=True)
class Point:
    """Runs that differ only in their seeds.

    Attributes:
        norm: Normaliser.
        batch_size: Samples in a step.
        clip: Adaptive gradient clipping, scaled to batch size 64.
        rate: Highest learning rate, scaled to batch size 64.
        records: One per seed, in order.
    """

    norm: str
    batch_size: int
    clip: float
    rate: float
    records: tuple[Record, ...]

    @property
    def validation(self) -> float:
        """Mean validation accuracy over the seeds, by which settings are chosen."""
        return statistics.mean(record.validation_accuracy for record in self.records)

    @property
    def test(self) -> float:
        """Mean test accuracy over the seeds."""
        return statistics.mean(record.test_accuracy for record in self.records)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the test accuracy over the seeds; None for one seed."""
        return statistics.stdev(r.test_accuracy for r in self.records) if len(self.records) > 1 else None

    @property
    def diverged(self) -> int:
        """Number of runs that diverged; they count as guesses."""
        return sum(record.diverged for record in self.records)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of a whole run, median over the seeds."""
        return statistics.median(record.cpu_seconds for record in self.records)


@dataclass(frozen=True)
class Choice:
    """The rate and clipping with which a normaliser does best on validation images at one batch size.

    Attributes:
        best: The runs with them.
        by_clip: The best rate of each clipping.
        trains: Rates that train at the chosen clipping: they reach 80 % of the best validation accuracy at this batch size.
        rates: Number of rates tried at the chosen clipping.
        runs: Number of runs at all rates and clippings.
        diverged: How many of them diverged.
        at_edge: Whether the chosen rate is the lowest or highest tried; the best one may lie beyond.
    """

    best: Point
    by_clip: tuple[Point, ...]
    trains: tuple[float, ...]
    rates: int
    runs: int
    diverged: int
    at_edge: bool


def points(records: Iterable[Record]) -> list[Point]:
    """Runs grouped by everything except the seed, ordered by batch size, normaliser, clipping and rate."""
    groups: dict[tuple[int, str, float, float], list[Record]] = defaultdict(list)
    for record in records:
        groups[_place(record.recipe)].append(record)
    order = {name: i for i, name in enumerate(NORMALIZERS)}
    return [
        Point(norm, size, clip, rate, tuple(sorted(runs, key=lambda run: run.recipe.seed)))
        for (size, norm, clip, rate), runs in sorted(groups.items(), key=lambda g: (g[0][0], order[g[0][1]], *g[0][2:]))
    ]


def promoted(
    recipes: Sequence[Recipe], found: Sequence[Record], finalists: int, contenders: int | None = None
) -> list[Recipe]:
    """The runs with the first seed and, with the other seeds, those at the settings that did best with the first.

    Args:
        recipes: All runs of a grid.
        found: Finished runs, among them all with the first seed.
        finalists: Number of pairs of rate and clipping that go on per normaliser and batch size.
        contenders: Number of normalisers that go on per batch size; None for all.
    """
    first = min(recipe.seed for recipe in recipes)
    wanted = set(recipes)
    groups: dict[tuple[int, str], list[Point]] = defaultdict(list)
    for point in points(record for record in found if record.recipe in wanted and record.recipe.seed == first):
        groups[point.batch_size, point.norm].append(point)
    rivals: dict[int, list[list[Point]]] = defaultdict(list)
    for (size, _), group in groups.items():
        rivals[size].append(sorted(group, key=lambda p: (-p.validation, p.rate))[:finalists])
    best = {
        _place(point.records[0].recipe)
        for ranked in rivals.values()
        for group in sorted(ranked, key=lambda group: -group[0].validation)[:contenders]
        for point in group
    }
    return [recipe for recipe in recipes if recipe.seed == first or _place(recipe) in best]


def choices(found: Sequence[Point]) -> list[Choice]:
    """The best point per batch size and normaliser by mean validation accuracy; in a tie the one with the lower rate.

    Where some points have more seeds than others, the choice is among those with the most.
    """
    groups: dict[tuple[int, str], list[Point]] = defaultdict(list)
    for point in found:
        groups[point.batch_size, point.norm].append(point)
    return [_choice(group, [p for p in found if p.batch_size == size]) for (size, _), group in groups.items()]


def _choice(group: Sequence[Point], rivals: Sequence[Point]) -> Choice:
    by_clip = {point.clip: point for point in sorted(group, key=lambda p: (len(p.records), p.validation, -p.rate))}
    best = max(by_clip.values(), key=lambda p: (len(p.records), p.validation, -p.clip))
    tried = [point for point in group if point.clip == best.clip]
    rates = sorted(point.rate for point in tried)
    bar = TRAINS * max(point.validation for point in rivals)
    return Choice(
        best=best,
        by_clip=tuple(by_clip[clip] for clip in sorted(by_clip)),
        trains=tuple(point.rate for point in sorted(tried, key=lambda p: p.rate) if point.validation >= bar),
        rates=len(rates),
        runs=sum(len(point.records) for point in group),
        diverged=sum(point.diverged for point in group),
        at_edge=len(rates) > 1 and best.rate in (rates[0], rates[-1]),
    )


def _place(recipe: Recipe) -> tuple[int, str, float, float]:
    """Batch size, normaliser, and clipping and rate scaled to batch size 64."""
    assert recipe.lr is not None
    assert recipe.clip is not None
    size = recipe.batch_size
    return size, recipe.norm, _rounded(recipe.clip / clip_at(size, 1.0)), _rounded(recipe.lr / rate_at(size, 1.0))


def _rounded(number: float) -> float:
    """The number without the rounding errors of scaling there and back."""
    return float(f"{number:.6g}")


def remaining_seconds(missing: Iterable[Recipe], records: Sequence[Record]) -> float | None:
    """CPU seconds that the missing runs will take, estimated from finished runs of the same kind; None if there are none.

    A run of a kind without finished runs counts as an average one.
    """
    if not records:
        return None
    kinds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for record in records:
        kinds[record.recipe.norm, record.recipe.batch_size].append(record.cpu_seconds)
    average = statistics.mean(record.cpu_seconds for record in records)
    return sum(statistics.mean(kinds.get((recipe.norm, recipe.batch_size), [average])) for recipe in missing)


def columns(clips: Sequence[float]) -> tuple[str, ...]:
    """The headings of `cells`."""
    each = tuple(f"clip {clip:g}, %" if clip else "no clip, %" for clip in clips)
    return ("batch", "normaliser", "test, %", "rate", "clip", *each, "rates that train", "diverged", "seeds", "CPU s")


def cells(choice: Choice, clips: Sequence[float]) -> tuple[str, ...]:
    """A choice as text, one cell per column."""
    best = choice.best
    by_clip = {point.clip: point for point in choice.by_clip}
    return (
        str(best.batch_size),
        best.norm,
        accuracy(best),
        f"{best.rate:g}" + (" (edge)" if choice.at_edge else ""),
        f"{best.clip:g}" if best.clip else "–",
        *(accuracy(by_clip[clip]) if clip in by_clip else "–" for clip in clips),
        " ".join(f"{rate:g}" for rate in choice.trains) or "none",
        f"{choice.diverged} of {choice.runs}",
        str(len(best.records)),
        f"{best.cpu_seconds:.0f}",
    )


def accuracy(point: Point) -> str:
    """Mean and, with several seeds, standard deviation of the test accuracy in %."""
    return spread([100 * record.test_accuracy for record in point.records])


def clips_of(found: Iterable[Point]) -> list[float]:
    """All clippings in increasing order."""
    return sorted({point.clip for point in found})


def to_dict(choice: Choice) -> dict[str, object]:
    """A choice as plain values, for JSON."""
    return {
        "batch_size": choice.best.batch_size,
        "norm": choice.best.norm,
        "best": _point_dict(choice.best),
        "best_of_each_clip": [_point_dict(point) for point in choice.by_clip],
        "rates_that_train": list(choice.trains),
        "rates_tried": choice.rates,
        "runs": choice.runs,
        "diverged": choice.diverged,
        "best_rate_at_edge": choice.at_edge,
    }


def _point_dict(point: Point) -> dict[str, object]:
    return {
        "rate_at_64": point.rate,
        "clip_at_64": point.clip,
        "lr": point.records[0].recipe.lr,
        "clip": point.records[0].recipe.clip,
        "validation_accuracy": [record.validation_accuracy for record in point.records],
        "test_accuracy": [record.test_accuracy for record in point.records],
        "mean_test_accuracy": point.test,
        "standard_deviation": point.spread,
        "diverged": point.diverged,
        "cpu_seconds": point.cpu_seconds,
    }
