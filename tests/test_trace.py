from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normprop
from normprop import TracingError
from normprop.graph.trace import LeafTracer, trace
from normprop.rules import TABLE


def convert(model: nn.Module) -> nn.Module:
    return normprop.convert(model, preserve=True)


class Block(nn.Module):
    """A convolution and a BatchNorm with something around them, given as ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.up = nn.Conv2d(8, 3, 1)

    def body(self, x: Any) -> Any:
        return self.up(self.bn(self.conv(x)).relu())


class Aligning(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if y.shape[2:] != x.shape[2:]:
            y = F.interpolate(y, size=x.shape[2:])
        return x + y


class Looping(Block):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1]):
            x = x + 1.0
        return torch.stack([self.body(part) for part in x.split(x.shape[0] // 2)]).mean(0)


class Asserting(Block):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, "images"
        _, channels, height, _ = x.shape
        assert channels == 3
        assert height % 2 == 0
        return self.body(x)


class OnValues(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else x


class Optional(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, flag: bool = False) -> Tensor:
        y = self.body(x) * scale
        return -y if flag else y if mask is None else y * mask


class Keywords(Block):
    def forward(self, *extra: Any, image: Tensor, gain: float = 1.0, **options: Any) -> Tensor:
        return self.body(image) * gain


@pytest.mark.parametrize("kind", [Aligning, Asserting, Optional])
def test_control_flow_on_sizes(kind: type[Block]) -> None:
    model = kind().double().eval()
    converted = convert(model)
    for batch, size in ((1, 16), (5, 32)):
        x = torch.randn(batch, 3, size, size, dtype=torch.float64)
        torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(converted))(x), model(x))


def test_an_input_that_would_take_another_branch_is_refused() -> None:
    converted = convert(Asserting())
    with pytest.raises(AssertionError, match="other sizes"):
        converted(torch.randn(1, 3, 15, 16))


def test_loops_over_sizes_are_unrolled() -> None:
    model = Looping().double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(convert(model)(x), model(x))


def test_control_flow_on_values_names_the_line_and_the_remedy() -> None:
    with pytest.raises(TracingError, match=r"test_trace\.py:\d+: return self\.body\(x\) if x\.sum\(\) > 0") as caught:
        convert(OnValues())
    assert "leaf_modules" in str(caught.value)


def test_a_leaf_with_a_rule_hides_control_flow() -> None:
    model = nn.Sequential(OnValues(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    converted = normprop.convert(model, leaf_modules=(OnValues,), rules={OnValues: lambda module, x: x})
    assert converted(-torch.rand(2, 3, 8, 8)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("leaf", ["0", Aligning])
def test_leaves_are_not_entered(leaf: Any) -> None:
    model = nn.Sequential(Aligning(), nn.ReLU())
    graph = trace(model, LeafTracer(TABLE, (leaf,))).graph
    assert [str(n.target) for n in graph.nodes if n.op == "call_module"] == ["0", "1"]


def test_optional_inputs_take_their_default_only() -> None:
    model = Optional().double().eval()
    converted = convert(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(converted(x, None, 2.0), model(x))
    torch.testing.assert_close(converted(x, flag=False), model(x))
    for options in ({"flag": True}, {"scale": 3.0}, {"mask": x}):
        with pytest.raises(AssertionError, match=f"converted with {next(iter(options))}="):
            converted(x, **options)


def test_keyword_only_inputs() -> None:
    model = Keywords().double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(convert(model)(image=x), model(image=x))


def test_a_forward_of_the_instance_is_what_is_traced() -> None:
    model = Aligning().double().eval()
    model.forward = lambda x: model.body(x) * 3.0  # type: ignore[method-assign]
    graph = trace(model, LeafTracer(TABLE)).graph
    assert "interpolate" not in str(graph)


def test_nodes_remember_their_source() -> None:
    graph = trace(Optional(), LeafTracer(TABLE)).graph
    node = next(n for n in graph.nodes if "relu" in n.name)
    assert "test_trace.py" in node.meta["source"]
