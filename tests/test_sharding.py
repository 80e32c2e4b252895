"""FSDP2: a network sharded as a whole trains as one process does; sharded parts are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import normprop
from normprop import NormPropError
from tests.zoo import SMALL, randomise


def work(rank: int, world: int, name: str, parts: str, reshard: bool, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        make, shape = SMALL[name]
        one = normprop.calibrate(normprop.convert(randomise(make()).double()), torch.randn(8, *shape).double())
        model: Any = copy.deepcopy(one)
        mesh = init_device_mesh("cpu", (world,))
        for path in parts.split():
            fully_shard(model.get_submodule(path), mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        x = torch.randn(4, *shape, dtype=torch.float64)
        optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, one)]
        for _ in range(3):
            for network, optimizer, samples in zip((model, one), optimizers, (x[rank::world], x), strict=True):
                optimizer.zero_grad()
                out = network(samples)
                F.mse_loss(out, torch.zeros_like(out)).backward()
                optimizer.step()
        for p, q in zip(model.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q, rtol=1e-7, atol=1e-9)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("parts", "reshard"), [("", True), ("", False), ("fc", True)])
def test_a_sharded_network_trains_as_a_whole_one(parts: str, reshard: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (2, "residual", parts, reshard, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]


def test_sharded_parts_are_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = normprop.convert(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        )
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
        with pytest.raises(NormPropError, match="sharded apart"):
            model(torch.randn(2, 4))
    finally:
        dist.destroy_process_group()
