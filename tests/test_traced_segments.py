"""Compiled segments in graphs that torch.compile traces: one operation forward and one back."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager

import normprop
from normprop.conversion import traced_segment
from normprop.conversion.lane import Lane
from normprop.native import operands
from normprop.native.library import library
from tests.zoo import SMALL, randomise

pytestmark = [
    pytest.mark.skipif(isinstance(library(), str), reason=f"no compiled functions: {library()}"),
    # torch.compile imports modules of torch that call what torch itself has deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
DOUBLE = torch.float64


class Own(nn.Module):
    """A forward of its own, so that torch.compile would run its hooks outside of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.other = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)
        self.slope = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.slope(self.norm(self.first(x)))
        return (y + self.other(self.second(y))).mean((2, 3))


def own(dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = normprop.convert(randomise(Own().to(dtype)), preserve=False)
    return model, torch.randn(4, 3, 8, 8, dtype=dtype)


def small(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network, shape = SMALL[name][0]().double(), SMALL[name][1]
    model = normprop.convert(randomise(network), example=torch.zeros(2, *shape, dtype=DOUBLE), preserve=False)
    return model, torch.randn(3, *shape, dtype=DOUBLE)


def outputs(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value.values() if isinstance(value, dict) else value)


def gradients(run: Callable[[Tensor], Any], model: nn.Module, x: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = sum((t.square() * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outputs(run(x)))
    return list(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))


class Recorder:
    """A backend that compiles nothing, and keeps the graphs of forwards and backwards."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self._keep)

    def _keep(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        del inputs
        self.graphs.append(graph)
        return make_boxed_func(graph.forward)

    def count(self) -> Counter[str]:
        names = (str(n.target) for graph in self.graphs for n in graph.graph.nodes if n.op == "call_function")
        return Counter(name for name in names if name.startswith("normprop"))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def in_torch(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a network's lane to torch's operations, those in which everything is written down first."""
    monkeypatch.setattr(Lane, "compiled", lambda *_: None)


@pytest.mark.parametrize("name", SMALL)
def test_one_operation_each_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(name)
    model.eval()  # without what is drawn at random
    recorder = Recorder()
    run = torch.compile(model, fullgraph=True, backend=recorder.backend)
    found = outputs(run(x)), gradients(run, model, x)
    count = recorder.count()
    compiled = normprop.lane(model).compiled(model, normprop.lane(model).entries[False])
    assert compiled is not None
    assert (
        count["normprop.segment.default"]
        == count["normprop.segment_backward.default"]
        == compiled.code.count("run_segment(")
    )
    in_torch(model, monkeypatch)
    for one, other in zip(found, (outputs(model(x)), gradients(model, model, x)), strict=True):
        size = max(float(t.detach().abs().max()) for t in other)
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * size)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_network_is_one_graph_and_is_traced_once(fullgraph: bool) -> None:
    model, x = own()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(model, fullgraph=fullgraph, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(run(x), model(x), rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


def test_any_number_of_samples() -> None:
    model, x = own()
    run = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 3, 2):
        torch.testing.assert_close(run(x[:n]), model(x[:n]), rtol=1e-12, atol=1e-12)


def test_every_change_is_seen() -> None:
    """Also what bumps no version: a write through ``.data``, and numbers of modules."""
    model, x = own()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    changes: list[Callable[[Any], Any]] = [
        lambda m: torch.optim.SGD(m.parameters(), 0.1).step(),
        lambda m: m.first.weight.data.mul_(torch.linspace(0.5, 2, 3, dtype=DOUBLE).view(1, 3, 1, 1)),
        lambda m: m.norm.bias.data.add_(0.3),
        lambda m: m.other.scale.data.mul_(1.7),
        lambda m: setattr(m.slope, "negative_slope", 0.05),
        lambda m: setattr(m.first, "weight", nn.Parameter(torch.randn(6, 3, 3, 3, dtype=DOUBLE))),
        lambda m: setattr(m.norm, "center", 0.75),
        lambda m: setattr(m.norm, "center", 0.0),
    ]
    before = run(x)
    before.square().sum().backward()
    for change in changes:
        with torch.no_grad():
            change(model)
        after = run(x)
        torch.testing.assert_close(after, model(x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(after, before)
        before = after


def test_copies_are_networks_of_their_own() -> None:
    model, x = own()
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    run, *runs = (torch.compile(m, fullgraph=True, backend="aot_eager") for m in (model, *others))
    expected = run(x)
    for other, compiled in zip(others, runs, strict=True):
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
        with torch.no_grad():
            other.norm.weight.mul_(2)
        torch.testing.assert_close(compiled(x), other(x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(compiled(x), expected)
        torch.testing.assert_close(run(x), expected, rtol=0, atol=0)
    copied = copy.deepcopy(run)
    del run, model
    gc.collect()
    torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)


def test_what_folding_leaves_knows_nothing_of_it() -> None:
    model, x = own()
    folded = normprop.fold(model)
    assert "__call__" not in vars(folded)
    torch.testing.assert_close(torch.compile(folded, fullgraph=True, backend="eager")(x), model(x))


def test_second_derivatives() -> None:
    model, x = own()
    x.requires_grad_()
    # The graph as it was traced: compilers that differentiate ahead of time have no second derivatives.
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graph.forward)
    found = []
    for run in (compiled, model):
        (slope,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(slope.square().sum(), parameters, allow_unused=True, materialize_grads=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_frozen_parameters() -> None:
    model, x = own()
    model.first.weight.requires_grad_(False)
    model.other.weight.requires_grad_(False)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(run, model, x), gradients(model, model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = own(dtype)
    # Half precision operation by operation: a compiler that joins some rounds less often.
    run = torch.compile(model, fullgraph=True, backend="aot_eager" if dtype == torch.float32 else aot_eager)
    assert run(x).dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(run(x), model(x), rtol=tolerance, atol=tolerance)
    for one, other in zip(gradients(run, model, x), gradients(model, model, x), strict=True):
        size, precise = float(other.abs().max()), dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-4 if precise else 0.05, atol=(1e-5 if precise else 0.02) * size)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_memory_formats(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, x = own()
        expected, slopes = model(x), gradients(model, model, x)
        model = model.to(memory_format=torch.channels_last)
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(x), expected, rtol=1e-12, atol=1e-12)
        for one, other in zip(gradients(run, model, x), slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    finally:
        torch.set_num_threads(before)


def test_exported_graphs_and_transforms_hold_torchs_operations_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = own()
    exported = torch.export.export(model.eval(), (x,))
    assert not any("normprop" in str(n.target) for n in exported.graph.nodes)
    recorder = Recorder()

    def slope(x: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda x: model(x).square().sum())(x)
        return found

    found = torch.compile(slope, fullgraph=True, backend=recorder.backend)(x)
    torch.testing.assert_close(found, slope(x), rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(operands, "_READY", False)  # as where there is no compiler
    torch.compile(model, fullgraph=True, backend=recorder.backend)(x)
    assert recorder.graphs
    assert not recorder.count()


def test_a_layer_of_another_size_is_no_memory_error() -> None:
    model, x = own()
    model.second.weight = nn.Parameter(torch.randn(6, 5, 3, 3, dtype=DOUBLE))
    with pytest.raises((RuntimeError, normprop.NormPropError)):
        torch.compile(model, backend="aot_eager")(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check looks at one
def test_the_operations_are_what_torch_expects_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = own()
    given: dict[str, Any] = {}
    for name in ("_segment", "_segment_backward"):
        operation = getattr(traced_segment, name)
        monkeypatch.setattr(traced_segment, name, keeping(operation, given, name))
    torch.compile(model, fullgraph=True, backend="eager")(x).square().sum().backward()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.normprop.segment.default, given["_segment"], test_utils=checks)
    torch.library.opcheck(torch.ops.normprop.segment_backward.default, given["_segment_backward"], test_utils=checks[2:3])


def keeping(operation: Any, given: dict[str, Any], name: str) -> Any:
    def called(*args: Any) -> Any:
        given[name] = args
        return operation(*args)

    return called
