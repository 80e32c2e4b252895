"""An account of what was run, with which settings, and of what wasn't."""

from __future__ import annotations

from collections.abc import Sequence

from normprop.lab.comparison.records import Record, software
from normprop.lab.reproduction.experiment_tables import HEADINGS
from normprop.lab.reproduction.runs import cells
from normprop.lab.reproduction.scale import SCALES, Scale
from normprop.lab.training.recipe import Recipe


def setting(scale: Scale, recipes: Sequence[Recipe], records: Sequence[Record], command: str) -> str:
    """Two paragraphs: what all runs have in common, and the time they took."""
    usual, mine = scale.usual, [record for record in records if record.recipe in set(recipes)]
    images = "all training images" if scale.train_images is None else f"{scale.train_images:,} training images"
    hours = sum(record.cpu_seconds for record in mine) / 3600
    versions = software(mine)
    return (
        f"Scale `{scale.name}`: the paper's network at width ×{scale.width:g} on {' and '.join(scale.data)}, {images} with "
        f"{scale.validation:,} more held out, {usual.epochs} epochs, the rate halved after every {usual.halve_every} (the "
        "paper: width ×1, all images, 200 epochs, after every 25). SGD, momentum 0.9, weight decay 5e-4, no clipping "
        "except where stated and for exact moments, which keep this library's default clipping; filters of the printed "
        "form are brought to unit length after each step. Mean ± standard deviation over seeds.\n\n"
        f"{len(mine)} of {len(recipes)} runs are finished, {hours:.1f} processor hours"
        f"{f'; {versions}' if versions else ''}. Command: `{command}`."
    )


def progress(part: str, scale: Scale, seeds: int, records: Sequence[Record]) -> str:
    """How much of an experiment is finished; empty if all of it is."""
    wanted = {run for runs in cells(part, scale, seeds).values() for run in runs}
    done = len(wanted & {record.recipe for record in records})
    return "" if done == len(wanted) else f"**Not finished: {done} of {len(wanted)} runs are done.**"


def not_run(scale: Scale, seeds: int, records: Sequence[Record], *, timed: bool) -> str:
    """A list of the paper's results that these lack."""
    full = SCALES["full"]
    missing = [data for data in full.data if data not in scale.data]
    lines = [f"- The paper's own settings (`--scale {full.name}`)."] if scale != full else []
    lines += [f"- {data}: table 1." for data in missing]
    for part, heading in HEADINGS.items():
        left = progress(part, scale, seeds, records)
        if left or (part == "speed" and not timed):
            lines.append(f"- {heading}: {left.strip('*') or 'Not measured.'}")
    return "\n".join(lines) or "Everything was run."
