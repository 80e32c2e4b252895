"""Private training in two processes, by Opacus' distributed optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import normprop
from normprop import NormPropError
from tests.zoo import Residual

opacus = pytest.importorskip("opacus")
integration = pytest.importorskip("normprop.integrations.opacus")
distributed = pytest.importorskip("opacus.distributed")

pytestmark = [  # Opacus': about its generator, hooks and types
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = normprop.convert(Residual().double(), example=torch.zeros(2, 3, 8, 8, dtype=torch.float64)).train()
    return normprop.calibrate(model, torch.randn(32, 3, 8, 8, dtype=torch.float64), directions=2)


def train(model: nn.Module, kind: str, batches: list[tuple[Tensor, Tensor]], wrap: Any) -> None:
    """SGD on clipped gradients without noise."""
    private = getattr(integration, kind)(model)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if kind == "PrivateNetwork":
        optimizer = private.optimizer(optimizer)
    sampled, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=wrap(private),
        optimizer=optimizer,
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(len(batches) * 4)), batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
    )
    optimizer.expected_batch_size = len(batches[0][0])
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(sampled(x), y).backward()
        optimizer.step()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=generator)
    return [(draw(), torch.randint(5, (8,), generator=generator)) for _ in range(3)]


def share(rank: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    wrap = distributed.DifferentiallyPrivateDistributedDataParallel
    try:
        mine = [(x[rank::2], y[rank::2]) for x, y in data()]
        model = network(rank if kind == "WholeNetwork" else 0)
        train(model, kind, mine, wrap)
        torch.save(model.state_dict(), f"{folder}/{rank}.pt")
        if kind == "PrivateNetwork":
            private = integration.PrivateNetwork(network(rank))
            wrap(private)
            if rank == 0:
                private(mine[0][0])
            else:
                with pytest.raises(NormPropError, match="Start all processes from the same parameters"):
                    private(mine[0][0])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["PrivateNetwork", "WholeNetwork"])
def test_two_processes_train_as_one_does_with_all_samples(kind: str, tmp_path: Path) -> None:
    """Processes whose networks start apart take that of the first, or say that they don't."""
    model = network(0)
    train(model, kind, data(), lambda private: private)
    torch.multiprocessing.spawn(share, (str(tmp_path), kind), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-9, atol=1e-12, msg=name)
