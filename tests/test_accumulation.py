from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop import NormPropError
from normprop.conversion.lane import Lane
from tests.test_promises import outputs, without_dropout
from tests.zoo import SMALL, randomise


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def passes(model: nn.Module, batches: Iterator[Tensor] | Tensor) -> None:
    for x in batches:
        sum(t.square().mean() for t in outputs(model(x))).backward()


@pytest.mark.parametrize("options", [{}, {"preserve": False}, {"preserve": False, "method": "paper"}], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_without(name: str, options: dict[str, object]) -> None:
    make, shape = SMALL[name]
    torch.manual_seed(0)
    model = without_dropout(normprop.convert(randomise(make()), **options).double().train())
    batches = torch.randn(3, 2, *shape, dtype=torch.float64)
    torch.manual_seed(1)  # of dropout
    passes(model, batches)
    expected = gradients(model)
    torch.manual_seed(1)
    with normprop.accumulate(model) as same:
        assert same is model
        passes(model, batches)
    found = gradients(model)
    assert found.keys() == expected.keys()
    size = max(float(g.abs().max()) for g in expected.values())
    assert all(float((found[n] - g).abs().max()) < 1e-9 * size for n, g in expected.items())


def counted(model: nn.Module, batches: Tensor) -> int:
    with mock.patch.object(Lane, "evaluate", autospec=True, side_effect=Lane.evaluate) as run:
        passes(model, batches)
    return int(run.call_count)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_the_lane_runs_once() -> None:
    model = normprop.convert(network())
    batches = torch.randn(5, 1, 4)
    assert counted(model, batches) == 5
    with normprop.accumulate(model):
        assert counted(model, batches) == 1


def test_modes_and_evaluation_inside() -> None:
    model = normprop.convert(network())
    x = torch.randn(3, 4)
    expected = model(x)
    with normprop.accumulate(model):
        torch.testing.assert_close(model(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), expected)
        torch.testing.assert_close(model(x), expected)
        model.train()
    torch.testing.assert_close(model(x), expected)


def test_networks_inside_others_take_part() -> None:
    model = nn.Sequential(normprop.Standardize(normprop.InputStats.standard(4)), normprop.convert(network()))
    batches = torch.randn(4, 1, 4)
    with normprop.accumulate(model):
        assert counted(model, batches) == 1
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_step_inside_is_an_error() -> None:
    model = normprop.convert(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step_inside() -> None:
        with normprop.accumulate(model):
            passes(model, torch.randn(1, 2, 4))
            optimizer.step()
            passes(model, torch.randn(1, 2, 4))

    optimizer.zero_grad()
    passes(model, torch.randn(1, 2, 4))
    with pytest.raises(NormPropError, match=r"optimizer\.step"):
        step_inside()
    assert "forward" not in vars(model)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = normprop.convert(network())
    with pytest.raises(RuntimeError, match="shape"), normprop.accumulate(model):
        model(torch.randn(1, 5))
    assert "forward" not in vars(model)
    passes(model, torch.randn(1, 2, 4))


def test_nothing_to_share() -> None:
    with pytest.raises(NormPropError, match="no converted network"), normprop.accumulate(network()):
        pass


def in_two_processes(rank: int, address: str, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    parallel = nn.parallel.DistributedDataParallel(normprop.convert(network()).double())
    torch.manual_seed(1)
    batches = torch.randn(2, 3, 2, 4, dtype=torch.float64)[rank]
    with normprop.accumulate(parallel):
        with parallel.no_sync():
            passes(parallel, batches[:-1])
        passes(parallel, batches[-1:])
    if rank == 0:
        torch.save(gradients(parallel.module), path)
    torch.distributed.destroy_process_group()


def test_data_parallel_processes_see_all_gradients(tmp_path: Path) -> None:
    address, path = f"file://{tmp_path}/rendezvous", str(tmp_path / "gradients.pt")
    torch.multiprocessing.spawn(in_two_processes, (address, path), nprocs=2)
    torch.manual_seed(0)
    model = normprop.convert(network()).double()
    torch.manual_seed(1)
    passes(model, torch.randn(2, 3, 2, 4, dtype=torch.float64).flatten(0, 1))
    for name, found in torch.load(path).items():
        torch.testing.assert_close(found, model.get_parameter(name).grad / 2, rtol=1e-9, atol=1e-9)
