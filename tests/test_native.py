"""The compiled arithmetic: built once, done without where it can't be, and the same numbers as without it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import normprop
from normprop.native import operands
from normprop.native.library import Library, library
from normprop.sites.engine import scales
from normprop.sites.rows import Form, Operands
from tests.zoo import SMALL, outputs

there = pytest.mark.skipif(isinstance(library(), str), reason=str(library()))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the library is built anew, in a process that may do without it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NORMPROP_NATIVE", raising=False)
    return tmp_path / "normprop"


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@there
def test_it_is_built_once_and_nothing_else_is_left_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(library.__wrapped__(), Library)
    (built,) = cache.iterdir()
    when = built.stat().st_mtime_ns
    assert isinstance(library.__wrapped__(), Library)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [when]


@there
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_library_that_is_not_whole_is_built_anew(keep: float, cache: Path) -> None:
    """A loader that reads beyond the end of a file ends the process."""
    assert isinstance(library.__wrapped__(), Library)
    (built,) = cache.iterdir()
    content = built.read_bytes()
    broken = built.with_name("broken")
    broken.write_bytes(content[: int(keep * len(content))])
    broken.replace(built)
    assert isinstance(library.__wrapped__(), Library)
    (again,) = cache.iterdir()
    assert again.stat().st_size > 0.9 * len(content)


@there
def test_a_flipped_bit_of_the_library_is_noticed(cache: Path) -> None:
    assert isinstance(library.__wrapped__(), Library)
    (built,) = cache.iterdir()
    content = bytearray(built.read_bytes())
    content[len(content) // 2] ^= 1
    other = built.with_name("other")
    other.write_bytes(content)
    other.replace(built)
    assert isinstance(library.__wrapped__(), Library)
    assert [path.read_bytes() for path in cache.iterdir()] != [bytes(content)]


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMPROP_NATIVE", "0")
    assert "NORMPROP_NATIVE" in str(library.__wrapped__())


def test_a_machine_without_compiler_does_without(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no C compiler" in str(library.__wrapped__())


@pytest.mark.parametrize(
    ("text", "reason"), [("echo out of luck >&2; exit 1", "out of luck"), ("exit 3", "status 3"), ("", "Error")]
)
def test_a_compiler_that_fails_is_said_to(
    text: str, reason: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "cc", text))
    assert reason in str(library.__wrapped__())
    assert not list(cache.iterdir())


@there
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "Error" in str(library.__wrapped__())


@there
def test_what_it_is_given() -> None:
    plain = torch.ones(3)
    assert operands.handles([plain, None, nn.Parameter(plain)], torch.float32)
    assert not operands.handles([plain.double()], torch.float32)
    assert not operands.handles([plain.half()], torch.float16)
    assert not operands.handles([plain.to("meta")], torch.float32)
    assert torch.func.vmap(lambda x: x * (1 - operands.handles([plain], torch.float32)))(plain).equal(plain)
    with FlopCounterMode(display=False):
        assert not operands.handles([plain], torch.float32)


@there
@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and says so in many ways
def test_a_recorded_network_computes_its_statistics_itself() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    model = normprop.convert(nn.Sequential(*layers)).eval()
    x = torch.randn(2, 3, 8, 8)
    recorded = torch.jit.trace(model, x, check_trace=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter).abs())
    torch.testing.assert_close(recorded(2 * x), model(2 * x))


@there
@pytest.mark.parametrize("name", SMALL)
def test_networks_compute_what_they_do_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, shape = SMALL[name]
    network = make().double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    found = []
    for there in (True, False):
        with monkeypatch.context() as patch:
            if not there:
                patch.setattr(operands, "library", lambda: "not here")
            model = normprop.convert(network, preserve=False).eval()
            ys = outputs(model(x))
            sum(y.square().sum() for y in ys).backward()
            found.append([*ys, *(p.grad for p in model.parameters() if p.grad is not None)])
            model.zero_grad()
    assert len(found[0]) == len(found[1]) > 3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@there
@pytest.mark.parametrize("center", [False, True])
def test_memory_that_is_not_in_one_piece(center: bool) -> None:
    torch.manual_seed(0)
    form = Form(center=center)
    weight = torch.randn(6, 8, 3, 3, dtype=torch.float64)[:, ::2].requires_grad_()
    mean, gamma = torch.randn(1, dtype=torch.float64).expand(4), torch.randn(12, dtype=torch.float64)[::2]
    rest = [torch.rand(6, dtype=torch.float64) + 0.5 for _ in range(3)]

    def outputs(w: torch.Tensor, m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        (scale,) = scales([form], [Operands(w, m, None, g, *rest)])
        assert scale.weight is not None
        return scale.weight.sum() + scale.offset.square().sum()  # the first gradient is one number, expanded

    tensors = [weight, mean.requires_grad_(), gamma.requires_grad_()]
    whole = [t.detach().contiguous().requires_grad_() for t in tensors]
    for a, b in zip(*(torch.autograd.grad(outputs(*few), few) for few in (tensors, whole)), strict=True):
        torch.testing.assert_close(a, b)
