"""Processes that share a list of runs: each does the next one that is neither done nor being done."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch

from normprop.errors import NormPropError
from normprop.lab.claim import claimed
from normprop.lab.comparison import records
from normprop.lab.comparison.records import RUNS, Record
from normprop.lab.samples.datasets import load
from normprop.lab.samples.images import Images
from normprop.lab.training.loop import train
from normprop.lab.training.observer import Watcher
from normprop.lab.training.processes import processes
from normprop.lab.training.recipe import Recipe

# Chooses the watcher of a run; it can be sent to other processes.
Watch = Callable[[Recipe, Images], Watcher]

# Seconds between two calls of `finished`.
_POLL = 0.5


def unwatched(_recipe: Recipe, _images: Images) -> Watcher:
    """A watcher that notes nothing."""
    return Watcher()


def work(
    recipes: Sequence[Recipe],
    folder: Path,
    *,
    images: Images,
    device: str = "cpu",
    watch: Watch = unwatched,
    finished: Callable[[], None] = lambda: None,
) -> None:
    """Do the runs that `folder` lacks, in order, and add each to its runs.jsonl.

    Any number of processes may do so at once: a run is claimed by a lock that ends with its process.

    Args:
        recipes: Resolved, all for one data set.
        folder: The folder of the results.
        images: The data set.
        device: The device to compute on.
        watch: Chooses who notes findings in each run.
        finished: Called after each run.

    Raises:
        NormPropError: for a recipe that can't be followed, or results that can't be written.
    """
    done = {record.recipe for record in records.read(folder / RUNS)}
    for recipe in recipes:
        if recipe in done:
            continue
        with _claim(recipe, folder) as mine:
            done = {record.recipe for record in records.read(folder / RUNS)}
            if mine and recipe not in done:
                records.append(folder / RUNS, measured(recipe, images, device, watch))
                finished()


def work_in_step(
    recipes: Sequence[Recipe], folder: Path, *, images: Images, device: str, watch: Watch = unwatched
) -> list[Recipe]:
    """`work` in processes that torchrun started, which share one run at a time and leave out what they can't share.

    Args:
        recipes: Resolved, all for one data set.
        folder: The folder of the results, which the first process writes.
        images: The data set.
        device: The device to compute on, as for `train`.
        watch: Chooses who notes findings in each run.

    Returns:
        The runs left out, whose batches can't be divided evenly.
    """
    with processes(device) as group:  # once for all runs: leaving and joining again is not safe
        done = {record.recipe for record in records.read(folder / RUNS)}
        group.wait()
        missing = [recipe for recipe in recipes if recipe not in done]
        for recipe in missing:
            if recipe.batch_size % group.world == 0:
                record = measured(recipe, images, device, watch)
                if group.writes:
                    records.append(folder / RUNS, record)
        return [recipe for recipe in missing if recipe.batch_size % group.world]


def measured(recipe: Recipe, images: Images, device: str, watch: Watch = unwatched) -> Record:
    """Train and record one run."""
    began = time.process_time()
    watcher = watch(recipe, images)
    run = train(recipe, images=images, device=device, observer=watcher)
    seconds = time.process_time() - began
    return Record(run.recipe, tuple(run.rows), images.classes, seconds, records.versions(), watcher.findings())


def work_together(
    recipes: Sequence[Recipe],
    folder: Path,
    *,
    jobs: int,
    device: str = "cpu",
    watch: Watch = unwatched,
    finished: Callable[[], None],
) -> None:
    """`work` in `jobs` processes of one thread each: one run of a small network doesn't fill two cores.

    Raises:
        NormPropError: what one of them raised, or that it was killed; the others are stopped.
    """
    others = multiprocessing.active_children()
    # Forking a process that has used torch's threads can hang.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare)
    try:
        running = {pool.submit(_load_and_work, recipes, folder, device, watch) for _ in range(jobs)}
        while running:
            ended, running = wait(running, timeout=_POLL)
            finished()
            for future in ended:
                future.result()
    except BrokenProcessPool as error:
        raise NormPropError(
            "A process that trained was killed.\nRepeat the command to go on, with fewer --jobs if memory is short."
        ) from error
    finally:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()  # a pool waits for what it runs
        pool.shutdown()


def _prepare() -> None:
    """Let this process end with its parent, and not before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _load_and_work(recipes: Sequence[Recipe], folder: Path, device: str, watch: Watch) -> None:
    images = load(recipes[0].data, image_size=recipes[0].image_size)
    work(recipes, folder, images=images, device=device, watch=watch)


def _claim(recipe: Recipe, folder: Path) -> AbstractContextManager[bool]:
    """A run, claimed for the time of a block (see `claimed`)."""
    key = hashlib.blake2b(json.dumps(asdict(recipe)).encode(), digest_size=16).hexdigest()
    return claimed(folder / ".claims" / key)
