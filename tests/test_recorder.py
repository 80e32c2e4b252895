from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normprop
from normprop import NormPropError, UnsupportedOpError
from normprop.graph.preparation import prepare
from normprop.graph.walk import Walk
from tests.zoo import randomise


def convert(model: nn.Module, **options: Any) -> nn.Module:
    return normprop.convert(model, preserve=True, **options)


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
        return self.body(x) if x.sum() > -1e9 else x


class Listing(Block):
    def forward(self, x: Tensor) -> Tensor:
        kept = torch.nonzero(x.flatten(1).sum(1) > -1e9).flatten().tolist()
        return self.body(x[kept])


class Optional(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, flag: bool = False) -> Tensor:
        y = self.body(x) * scale
        return -y if flag else y if mask is None else y * mask


class Keywords(Block):
    def forward(self, *extra: Any, image: Tensor, gain: float = 1.0, **options: Any) -> Tensor:
        return self.body(image) * gain


@pytest.mark.parametrize("kind", [Aligning, Asserting, Optional, OnValues, Listing])
def test_control_flow_is_the_networks_own(kind: type[Block]) -> None:
    torch.manual_seed(0)
    model = randomise(kind()).double().eval()
    converted = convert(model)
    for batch, size in ((1, 16), (5, 32)):
        x = torch.randn(batch, 3, size, size, dtype=torch.float64)
        torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(converted))(x), model(x))


def test_what_the_network_refuses_it_refuses_still() -> None:
    with pytest.raises(AssertionError):
        convert(Asserting())(torch.randn(1, 3, 15, 16))


def test_a_block_in_a_loop_is_several_calls() -> None:
    torch.manual_seed(0)
    model = randomise(Looping()).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    converted = convert(model)
    torch.testing.assert_close(converted(x), model(x))
    with pytest.raises(NormPropError, match="example="):
        converted(torch.randn(3, 3, 16, 16, dtype=torch.float64))  # three parts where two were recorded


def test_a_leaf_with_a_rule_hides_what_is_in_it() -> None:
    model = nn.Sequential(OnValues(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(NormPropError, match=r"0\.bn"):  # a BatchNorm in a leaf would look at the batch
        normprop.convert(model, leaf_modules=(OnValues,), rules={OnValues: lambda module, x: x})
    model[0] = Doubling()
    converted = normprop.convert(model, leaf_modules=(Doubling,), rules={Doubling: lambda module, x: x.scaled(2.0)})
    assert converted(-torch.rand(2, 3, 8, 8)).shape == (2, 4, 8, 8)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(torch.stack([x, x]), 0)[-1]


@pytest.mark.parametrize("leaf", ["0", Doubling])
def test_leaves_are_kept_whole(leaf: Any) -> None:
    walk = prepare(
        nn.Sequential(Doubling(), nn.Conv2d(3, 3, 1)), leaf_modules=(leaf,), rules={Doubling: lambda module, x: x}
    )
    assert [n.target for n in walk.nodes if n.op == "module"] == ["0", "1"]


def test_optional_inputs_take_any_value() -> None:
    torch.manual_seed(0)
    model = randomise(Optional()).double().eval()
    converted = convert(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for options in ({}, {"flag": True}, {"scale": 3.0}, {"mask": torch.rand(4, 4, dtype=torch.float64)}):
        torch.testing.assert_close(converted(x, **options), model(x, **options))


def test_keyword_only_inputs() -> None:
    torch.manual_seed(0)
    model = randomise(Keywords()).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(convert(model)(image=x, gain=0.5), model(image=x, gain=0.5))
    torch.testing.assert_close(convert(model, example={"image": x})(image=x), model(image=x))


def test_a_forward_of_the_instance_is_what_is_recorded() -> None:
    model = Aligning().double().eval()
    model.forward = lambda x: model.body(x) * 3.0  # type: ignore[method-assign]
    assert not any("interpolate" in str(n.target) for n in prepare(model).nodes)


def test_nodes_remember_their_source() -> None:
    node = next(n for n in prepare(Optional()).nodes if "relu" in n.name)
    assert "test_recorder.py" in node.source


def moments_of(f: Any) -> tuple[Walk, list[str]]:
    torch.manual_seed(0)

    class Function(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.table = nn.Linear(4, 4), torch.ones(4)

        def forward(self, x: Tensor) -> Any:
            return f(self.a(x), self.table)

    walk = prepare(Function())
    return walk, [walk.operation(n) for n in walk.nodes if n.data and n.op != "input"]


def statement(h: Tensor, _: Tensor) -> Tensor:
    F.relu_(h)
    h.mul_(10.0)
    return h


def through_a_view(h: Tensor, _: Tensor) -> Tensor:
    h.view(-1, 2, 2).mul_(10.0)
    return torch.relu(h)


def of_a_part(h: Tensor, _: Tensor) -> Tensor:
    h[:, :2].mul_(10.0)
    return torch.relu(h)


def augmented(h: Tensor, table: Tensor) -> Tensor:
    h += table
    return 1.0 - h


def written_to(h: Tensor, table: Tensor) -> Tensor:
    out = h.new_zeros(h.shape)
    torch.add(h, table, out=out)
    return out


def test_statements_in_place_are_seen() -> None:
    report = normprop.propagate(moments_of(statement)[0].model)
    same = normprop.propagate(moments_of(lambda h, _: F.relu(h) * 10.0)[0].model)
    torch.testing.assert_close(report[-1].predicted.var.mean() / report[1].predicted.var.mean(),
                               same[-1].predicted.var.mean() / same[1].predicted.var.mean())  # fmt: skip
    walk, names = moments_of(through_a_view)
    assert names.index(".mul_") < names.index("torch.relu")
    relu = next(n for n in walk.nodes if getattr(n.target, "__name__", "") == "relu")
    assert relu.inputs[0].target == "reshape"
    assert relu.inputs[0].inputs[0].target == "mul_"


def of_a_narrow_part(h: Tensor, _: Tensor) -> Tensor:
    h.narrow(1, 0, 2).mul_(10.0)
    return torch.relu(h)


def test_changes_of_a_part_are_changes_of_the_whole() -> None:
    (change,) = (row for row in normprop.propagate(moments_of(of_a_part)[0].model) if row.operation == "operator.setitem")
    assert change.predicted.var.flatten()[:2].mean() > 20 * change.predicted.var.flatten()[2:].mean()


class Filled(nn.Module):
    """A tensor of the network's own making, which is filled with what depends on data."""

    def __init__(self, fill: Any) -> None:
        super().__init__()
        self.layer, self.norm, self.end, self.fill = nn.Linear(4, 4), nn.BatchNorm1d(6), nn.Linear(6, 2), fill

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.norm(self.fill(torch.relu(self.layer(x)), torch.zeros(len(x), 6, dtype=x.dtype))))


def by_slices(x: Tensor, out: Tensor) -> Tensor:
    out[:, :4] = x
    out[:, 4] = x[:, 0] * 2
    out[:, 5:] = 0.3
    return out


def by_copies(x: Tensor, out: Tensor) -> Tensor:
    out[:, 1:5].copy_(x)
    return out


def by_a_view_of_a_view(x: Tensor, out: Tensor) -> Tensor:
    inner = out[:, 1:]
    inner[:, :4] += x
    return out * 2


def by_a_sum(x: Tensor, out: Tensor) -> Tensor:
    same = out.view(-1, 6)
    same += torch.cat([x, x[:, :2]], 1)
    return out


def with_a_look(x: Tensor, out: Tensor) -> Tensor:
    out[:, :4] = x
    return out if float(out.sum()) > 0 else out - 1


@pytest.mark.parametrize("fill", [by_slices, by_copies, by_a_view_of_a_view, by_a_sum, with_a_look])
def test_what_depends_on_data_may_be_written_to_what_does_not(fill: Any) -> None:
    """On the meta device, that has its numbers elsewhere, too."""
    torch.manual_seed(0)
    model, x = Filled(fill).double().eval(), torch.randn(20_000, 4, dtype=torch.float64)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    converted = normprop.convert(model, example=x[:3])
    torch.testing.assert_close(converted(x[:5]), model(x[:5]))
    torch.testing.assert_close(converted(x[:1]), converted(x[:5])[:1])
    taken: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach()))
    model(x)
    rows = list(normprop.propagate(model, example=x[:3]))
    source = next(i for i, row in enumerate(rows) if row.operation == "BatchNorm1d") - 1
    predicted, z = rows[source].predicted.channels(), taken[0]
    assert float((z.mean(0) - predicted.mean).abs().max()) < 0.03
    assert float((z.var(0) - predicted.var).abs().max()) < 0.05


@pytest.mark.parametrize("f", [of_a_narrow_part])
def test_changes_through_part_of_a_tensor_are_refused_by_name(f: Any) -> None:
    with pytest.raises(UnsupportedOpError, match=r"(?s)in-place change.*test_recorder\.py"):
        normprop.propagate(moments_of(f)[0].model)


def test_operators_are_known_by_their_functions() -> None:
    _, names = moments_of(augmented)
    assert names[-2:] == [".add_", "torch.rsub"]


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x * 2 if x.is_meta else torch.from_numpy(x.numpy() * 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_a_tensor_whose_maker_was_not_seen_is_no_constant() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.b(Hidden.apply(self.a(x))))

    with pytest.raises(UnsupportedOpError, match="was not seen"):
        normprop.convert(Net())


def test_tensors_in_attributes_and_literals_are_constants() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.c, self.n = torch.tensor([0.1, 0.2, 0.3]), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = (x - self.mean.view(1, 3, 1, 1)) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
            return self.n(self.c(x + torch.linspace(-1, 1, x.shape[-1], device=x.device)))

    torch.manual_seed(0)
    model = randomise(Net()).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(convert(model, example=x)(x), model(x), rtol=1e-4, atol=1e-5)
    (entry,) = normprop.lane(convert(model, example=x)).all_entries()
    assert entry.moments is not None


def test_states_of_random_generators_stay() -> None:
    class Noisy(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * random.random() * float(np.random.rand()) + torch.rand(1)

    model = Noisy()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    normprop.convert(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


class Catching(nn.Module):
    """Asks its layers for more than some of them take, as toolkits for speech do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv1d(3, 4, 3), nn.ReLU(), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            try:
                x = block(x, lengths=None)
            except TypeError:
                x = block(x)
        return x


def test_exceptions_that_the_network_catches() -> None:
    model = randomise(Catching()).double().eval()
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    converted = normprop.convert(model)
    assert [row.operation for row in normprop.propagate(model)] == ["input", "Conv1d", "ReLU", "BatchNorm1d", "Conv1d"]
    torch.testing.assert_close(converted(x), model(x))


class Reading(nn.Module):
    """Reads the second result of an operation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "weights":
            y, weights = self.attention(x, x, x)
            y = weights @ y
        elif self.how == "named":
            y = x * x.max(1, keepdim=True).indices
        else:
            y, places = x.max(1, keepdim=True)
            y = y + places if self.how == "indices" else y
        return self.norm(self.head(y).transpose(1, 2))


@pytest.mark.parametrize(("how", "operation"), [("weights", "matmul"), ("indices", "add"), ("named", "mul")])
def test_second_results_that_something_reads_are_refused_by_name(how: str, operation: str) -> None:
    for function in (normprop.convert, normprop.propagate):
        with pytest.raises(normprop.UnsupportedOpError, match="indices or attention weights") as error:
            function(Reading(how))
        assert operation in error.value.operations[0]
    assert normprop.convert(Reading("neither"))(torch.randn(2, 5, 8)).shape == (2, 8, 1)
