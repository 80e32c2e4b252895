"""How far to centre: what other powers of n are worth where `keep_calibrated` sets c = 1 − n^−p, see docs/method.md.

    pip install gymnasium
    python experiments/how_far.py    # half an hour of a core; --every 0 and --every 1 for other starts

n is how many inputs a filter has; at p = ∞ filters lose all of their mean, at 0 nothing. One rate and one clipping for each
task, as docs/tasks.md has them. The networks are those of own_loop.py, detection.py, reinforcement.py, segmentation.py and
`normprop demo`, kept calibrated by default but for the power, and for which filters start with all of their mean: every
second by default, all with --every 1, none with --every 0.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import detection
import own_loop
import reinforcement
import segmentation
import torch
from scenes import training_and_test

from normprop.conversion import partial_centering
from normprop.lab.commands.demo import recipe_of
from normprop.lab.training.loop import train

POWERS = (math.inf, 0.75, 0.5, 0.25, 0.0)


def tasks() -> dict[str, tuple[range, Callable[[int], dict[str, Any]]]]:
    """Seeds of each task, and what makes a run of one."""
    images, scenes = own_loop.data(), training_and_test(detection.SIZE)
    own = lambda *what: lambda seed: own_loop.train(images, ("kept calibrated", *what, 0.05, seed))
    segmented = lambda seed: segmentation.train("normprop", 1, 3e-3, 0.05, seed, segmentation.STEPS, segmentation.SIZE)
    return {
        "digits, SGD": (range(3), digits),
        "own loop, AdamW": (range(5), own("AdamW", 8, 3e-3)),
        "own loop, SGD": (range(5), own("SGD", 8, 0.03)),
        "detection": (range(3), lambda seed: detection.train(scenes, ("normprop", 1e-3, 0.05, seed))),
        "Q-learning": (range(2, 7), lambda seed: reinforcement.train(("normprop", 1e-3, 0.05, seed))),
        "segmentation": (range(3), segmented),
    }


def digits(seed: int) -> dict[str, Any]:
    """The demonstration's network with one image a step."""
    found = train(recipe_of("normprop", 1, 3, seed), device="cpu").rows[-1].test_accuracy
    return {"test": 100 * (0.1 if found is None else found)}


def main() -> None:
    known = tasks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--powers", nargs="+", type=float, default=POWERS)
    parser.add_argument(
        "--every", type=int, default=partial_centering.EVERY, help="which filters start with their mean; 0: none"
    )
    parser.add_argument("--tasks", nargs="+", default=tuple(known), choices=tuple(known))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in options.tasks:
        seeds, run = known[task]
        for power in options.powers:
            partial_centering.COMMON, partial_centering.EVERY = power, options.every
            found = [run(seed)["test"] for seed in seeds]
            title = f"{task}, p = {power:g}, every {options.every}"
            print(f"{title}: {statistics.mean(found):.1f} of", ", ".join(f"{t:.1f}" for t in found), flush=True)


if __name__ == "__main__":
    main()
