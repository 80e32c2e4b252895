"""Q-learning on CartPole with a critic that is normalised in several ways.

    pip install gymnasium
    python experiments/reinforcement.py            # what isn't finished yet; a killed one continues
    python experiments/reinforcement.py --report   # the table from the runs that are there

Double Q-learning (van Hasselt et al. 2016) with replay: 4,000 steps, two hidden layers of 64 units, Adam, batches of 32
transitions every second step, a target network that is copied every 100 updates. The result is the mean return of 20
greedy episodes, five after each eighth of the steps in their second half. The same for all: rates, adaptive gradient
clipping or none. The pair of them with the best result over two seeds is run with five others. BatchNorm trains on the
batch's statistics, and acts and looks ahead with its running ones. A converted critic has `keep_calibrated` with
states from the memory.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import runs_file
import torch
import torch.nn.functional as F
from rivals import conversion
from torch import Tensor, nn

import normprop
from normprop.optim import AdaptiveGradientClipping

OUT = Path(__file__).resolve().parent / "results" / "reinforcement" / "runs.jsonl"
# once: calibrated when learning begins and not again.
CONVERTED = ("normprop", "centred", "uncentred", "uncentred, once")
CRITICS = (*CONVERTED, "BatchNorm", "LayerNorm", "none")
# Rate and clipping.
SETTINGS = ((1e-3, 0.0), (1e-3, 0.05), (3e-3, 0.0))
CHOOSING, TESTING = (0, 1), (2, 3, 4, 5, 6)
STEPS, FIRST, BATCH, DISCOUNT, COPIED, MEASURED = 4000, 500, 32, 0.99, 100, 64
# ε falls from 1 to this over so many steps.
LEAST, FALLING = 0.05, 2000
# Returns of greedy episodes, so many at a time, at the end of every eighth of the steps in their second half.
EPISODES = 5
KEYS = ("critic", "rate", "clip", "seed")


class Transitions(NamedTuple):
    """What happened: states ``(N, 4)``, actions ``(N,)``, rewards, the next states, and 1 where an episode failed."""

    state: Tensor
    action: Tensor
    reward: Tensor
    following: Tensor
    failed: Tensor


class Memory:
    """All transitions, in the order in which they came."""

    def __init__(self, size: int, features: int) -> None:
        self.count = 0
        self.kept = Transitions(
            torch.zeros(size, features), torch.zeros(size, dtype=torch.long), torch.zeros(size),
            torch.zeros(size, features), torch.zeros(size),
        )  # fmt: skip

    def add(self, *values: Any) -> None:
        """One transition."""
        for column, value in zip(self.kept, values, strict=True):
            column[self.count] = torch.as_tensor(value)
        self.count += 1

    def sample(self, count: int) -> Transitions:
        """Some of them, each as likely as the others."""
        rows = torch.randint(self.count, (count,))
        return Transitions(*(column[rows] for column in self.kept))


def critic(name: str, features: int, actions: int, samples: Tensor) -> nn.Module:
    """Values of all actions."""
    layers: list[nn.Module] = []
    for inside in (features, 64):
        norms = {"none": [], "LayerNorm": [nn.LayerNorm(64)]}.get(name, [nn.BatchNorm1d(64)])
        layers += [nn.Linear(inside, 64), *norms, nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, actions))
    if name in CONVERTED:
        return normprop.convert(model, example=samples, **conversion(name.partition(",")[0])[0])
    return model


@torch.no_grad()
def targets(model: nn.Module, target: nn.Module, batch: Transitions) -> Tensor:
    """r + γ Q'(s', argmax Q(s')), without the second part where an episode failed."""
    model.eval()
    best = model(batch.following).argmax(1, keepdim=True)
    ahead = target(batch.following).gather(1, best)[:, 0]
    return batch.reward + DISCOUNT * (1 - batch.failed) * ahead


@torch.no_grad()
def greedy(model: nn.Module, state: Any) -> int:
    """The action of the highest value."""
    return int(model.eval()(torch.as_tensor(state)[None]).argmax())


def mean_return(model: nn.Module, environment: Any, seed: int) -> float:
    """Of greedy episodes."""
    total = 0.0
    for episode in range(EPISODES):
        state, _ = environment.reset(seed=seed + episode)
        over = False
        while not over:
            state, reward, failed, late, _ = environment.step(greedy(model, state))
            total, over = total + float(reward), failed or late
    return total / EPISODES


def train(what: tuple[Any, ...], steps: int = STEPS) -> dict[str, Any]:
    """One run: what it was, and what came of it."""
    import gymnasium

    name, rate, clip, seed = what
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    environment, examination = gymnasium.make("CartPole-v1"), gymnasium.make("CartPole-v1")
    memory = Memory(steps, 4)
    state, _ = environment.reset(seed=seed)
    began, returns, learner = time.process_time(), list[float](), None
    for step in range(steps):
        if step == FIRST:
            learner = Learner(name, rate, clip, memory)
        explores = random.random() < max(LEAST, 1 - (1 - LEAST) * step / FALLING)
        action = int(random.integers(2)) if learner is None or explores else greedy(learner.model, state)
        following, reward, failed, late, _ = environment.step(action)
        memory.add(state, action, reward, following, float(failed))
        state = environment.reset()[0] if failed or late else following
        if learner is not None and step % 2 == 0:
            learner.update()
        if learner is not None and (step + 1) % (steps // 8) == 0 and step >= steps // 2:
            returns.append(mean_return(learner.model, examination, 10_000 * (seed + 1)))
    found: dict[str, Any] = {"test": statistics.mean(returns), "returns": returns}
    if learner is not None and learner.handle is not None:
        worst = normprop.inspect(learner.model, memory.sample(1000).state).worst
        found |= {"drift": worst.drift if worst else None, "measuring": learner.handle.seconds}
    return dict(zip(KEYS, what, strict=True)) | found | {"seconds": time.process_time() - began}


class Learner:
    """A critic, its optimizer and its target."""

    def __init__(self, name: str, rate: float, clip: float, memory: Memory) -> None:
        self.model = model = critic(name, 4, 2, memory.sample(MEASURED).state)
        self.memory, self.updates = memory, 0
        self.optimizer = torch.optim.Adam(model.parameters(), rate)
        self.handle: Any = None
        if name in CONVERTED:
            every = 0 if name.endswith("once") else 200
            options = conversion(name.partition(",")[0])[1]
            states = lambda _step: memory.sample(MEASURED).state
            self.handle = normprop.keep_calibrated(model, self.optimizer, states, clip=clip, every=every, **options)
        elif clip:
            AdaptiveGradientClipping(self.optimizer, clip=clip)
        self.target = copy.deepcopy(model).eval()

    def update(self) -> None:
        """One step of the optimizer."""
        batch = self.memory.sample(BATCH)
        wanted = targets(self.model, self.target, batch)
        values = self.model.train()(batch.state).gather(1, batch.action[:, None])[:, 0]
        self.optimizer.zero_grad()
        F.smooth_l1_loss(values, wanted).backward()
        self.optimizer.step()
        self.updates += 1
        if self.updates % COPIED == 0:
            self.target.load_state_dict(self.model.state_dict())


def chosen(runs: list[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """The rate and clipping with the best mean return over the seeds for choosing."""
    means = {}
    for pair in SETTINGS:
        found = _returns(runs, name, pair, CHOOSING)
        if len(found) == len(CHOOSING):
            means[pair] = statistics.mean(found)
    return max(means, key=lambda pair: means[pair], default=None)


def _returns(runs: list[dict[str, Any]], name: str, pair: tuple[float, float], seeds: tuple[int, ...]) -> list[float]:
    return [r["test"] for r in runs if (r["critic"], r["rate"], r["clip"]) == (name, *pair) and r["seed"] in seeds]


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: mean return over other seeds with the chosen rate and clipping, and the mean of all over the first two."""
    lines = [
        "| critic | return | of each seed | rate, clip | " + " | ".join(f"{r:g}, {c or '–'}" for r, c in SETTINGS) + " |",
        "| --- | ---: | --- | --- | " + "---: | " * len(SETTINGS),
    ]
    for name in CRITICS:
        best = chosen(runs, name)
        if best is None:
            continue
        tested = _returns(runs, name, best, TESTING)
        mean = f"{statistics.mean(tested):.0f}" if tested else "–"
        spread = f" ± {statistics.stdev(tested):.0f}" if len(tested) > 1 else ""
        firsts = [_returns(runs, name, pair, CHOOSING) for pair in SETTINGS]
        lines.append(
            f"| {name} | {mean}{spread} | {', '.join(f'{one:.0f}' for one in sorted(tested))} "
            f"| {best[0]:g}, {best[1] or '–'} | {' | '.join(f'{statistics.mean(f):.0f}' if f else '–' for f in firsts)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs = runs_file.read(options.out)
    if not options.report:

        def once(*what: Any) -> None:
            runs_file.once(options.out, runs, KEYS, what, lambda: train(what))

        for seed, setting, name in itertools.product(CHOOSING, SETTINGS, CRITICS):
            once(name, *setting, seed)
        for seed, name in itertools.product(TESTING, CRITICS):
            best = chosen(runs, name)
            if best is not None:
                once(name, *best, seed)
    print(table(runs))


if __name__ == "__main__":
    main()
