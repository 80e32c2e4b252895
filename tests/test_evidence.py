"""Parts of the benchmarks that look for faults, so that these scripts run; the whole of each takes hours."""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.zoo import SMALL

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import each other by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == SCRIPTS:
            del sys.modules[name]


def stated(first: int, end: int) -> None:
    import stated_errors

    for seed in range(first, end):
        text, ratio = stated_errors.attempt(seed)
        assert ratio <= 1.0, f"draw {seed} is off by {ratio:.2g} stated errors: {text}"


def test_stated_errors_are_upper_bounds() -> None:
    stated(0, 2)


@pytest.mark.slow
def test_more_stated_errors_are_upper_bounds() -> None:
    stated(200, 210)


@pytest.mark.parametrize("option", ["normalize=all", "method=paper", "rules"])
@pytest.mark.parametrize("name", list(SMALL)[:2])
def test_options(name: str, option: str) -> None:
    import foreign
    import foreign_options

    build, shape = SMALL[name]
    model = build()
    foreign.randomise(model.double().eval(), 1.0)
    assert foreign_options.outcome(option, model, (torch.randn(2, *shape, dtype=torch.float64),)) == "passed"


def test_options_tell_what_is_wrong() -> None:
    import foreign_options

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) - self.inner(x).mean(0)

    found = foreign_options.outcome("method=paper", Mixed().double().eval(), (torch.randn(2, 3, dtype=torch.float64),))
    assert found.startswith(("wrong", "refused"))


@pytest.mark.slow
def test_rules_of_pooling_and_attention_are_near_what_photographs_give() -> None:
    """Patches of photographs, the statistics of which no rule knows: standard deviations are right to a factor of two."""
    pytest.importorskip("sklearn")
    import moment_evidence

    torch.manual_seed(0)
    images = moment_evidence.photographs(32, 256)
    found = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for network in (moment_evidence.Attending(), moment_evidence.pooling_network(0)):
            model = moment_evidence.with_statistics(network, images)
            for kind, ratio, _ in moment_evidence.compare(model, images):
                found[kind].append(ratio)
    assert {"attention", "softmax", "maximum", "average", "global average", "product of activations"} <= set(found)
    assert all(0.5 < ratio < 2.0 for kind in ("attention", "average", "global average", "maximum") for ratio in found[kind])
