"""The whole recipe in anybody's loop: the function stays, runs go on as if nothing had happened, nobody's habits matter."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import normprop
from normprop import NormPropError
from normprop.sites.rows import Form, to_rows
from normprop.sites.site import Site
from tests.test_calibrate import images
from tests.zoo import SMALL, Gated, PreActivation, Residual, Shared

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=3e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "Residual": Residual, "PreActivation": PreActivation, "Gated": Gated, "Shared": Shared,
}  # fmt: skip


def started(network: nn.Module, make: Callable[[Any], torch.optim.Optimizer], **options: Any) -> Any:
    """A converted network, its optimizer, and what keeps it calibrated."""
    model = normprop.convert(network.double())
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    return model, optimizer, normprop.keep_calibrated(model, optimizer, images(64), **options)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return torch.cat([t.flatten() for t in y.values()]) if isinstance(y, dict) else y.flatten()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, *, batch: int = 2) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    x = images(64)[seed % 32 : seed % 32 + batch]
    (outputs(model, x) - torch.randn(1)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_measuring_changes_constants_and_no_function(name: str, network: str) -> None:
    torch.manual_seed(0)
    model, optimizer, handle = started(NETWORKS[network](), OPTIMIZERS[name], every=0)
    for seed in range(5):
        step(model, optimizer, seed)
    sites = [m for m in model.modules() if isinstance(m, Site)]
    before, constants = outputs(model.eval(), images(8)), [site.scale.clone() for site in sites]
    handle._measure()
    torch.testing.assert_close(outputs(model.eval(), images(8)), before, rtol=1e-8, atol=1e-8)
    assert any(float((site.scale / old - 1).abs().max()) > 1e-3 for site, old in zip(sites, constants, strict=True))
    for seed in range(2):
        step(model, optimizer, seed)
    assert bool(outputs(model, images(8)).isfinite().all())


@pytest.mark.parametrize("network", ["Residual", "PreActivation", "Gated"])
def test_one_pass_finds_what_calibration_finds(network: str) -> None:
    torch.manual_seed(0)
    model = normprop.calibrate(normprop.convert(NETWORKS[network]().double()), images(64), directions=3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    normprop.recalibrate(model, optimizers[0], images(64), directions=None)
    normprop.calibrate(other, images(64), directions=0, preserve=True)
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        if isinstance(mine, Site) and isinstance(theirs, Site) and mine.weight is not None:
            torch.testing.assert_close(mine.weight, theirs.weight)  # what no direction enters
            torch.testing.assert_close(mine.bias, theirs.bias)
    directions = [m.directions for m in model.modules() if isinstance(m, Site) and m.directions is not None]
    assert network == "PreActivation" or any(bool(d.any()) for d in directions)  # it has no layer before a site


def test_it_measures_early_and_often_then_seldom() -> None:
    torch.manual_seed(0)
    model, optimizer, handle = started(Residual(), OPTIMIZERS["AdamW"], every=50, samples=4)
    for seed in range(110):
        step(model, optimizer, seed)
    assert handle.measured == [0, 16, 32, 50, 100]
    assert "clipped at 0.05" in repr(handle)
    assert "\n" not in repr(handle)
    handle.remove()
    step(model, optimizer, 0)
    assert handle.step == 110


@pytest.mark.parametrize("network", ["Residual", "Shared"])
@pytest.mark.parametrize("name", ["momentum", "AdamW"])
def test_an_interrupted_run_ends_with_the_same_bits(name: str, network: str) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(64)), batch_size=8, shuffle=True)
        model = normprop.convert(NETWORKS[network]().double())
        optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
        return model, optimizer, normprop.keep_calibrated(model, optimizer, loader, samples=8)

    whole = fresh()
    for seed in range(20):
        step(*whole[:2], seed)
    first, file = fresh(), io.BytesIO()
    for seed in range(10):
        step(*first[:2], seed)
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = fresh()
    for part, state in zip(second, torch.load(file), strict=True):
        part.load_state_dict(state)
    for seed in range(10, 20):
        step(*second[:2], seed)
    assert second[2].measured == whole[2].measured == [0, 16]
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_start_and_a_draw_leave_random_numbers_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(images(32), batch_size=4, shuffle=True, generator=generator)
    model = normprop.convert(Residual().double())
    before = torch.get_rng_state(), generator.get_state()
    normprop.keep_calibrated(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], generator.get_state())


@pytest.mark.parametrize("fused", [False, True], ids=["unscaled before", "unscaled by the optimizer"])
def test_a_grad_scaler_makes_no_difference(fused: bool) -> None:
    found = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = normprop.convert(Residual())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=fused)
        handle = normprop.keep_calibrated(model, optimizer, images(64).float(), clip=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=scaled)
        for seed in range(18):
            optimizer.zero_grad()
            scaler.scale(outputs(model, images(64).float()[seed : seed + 2]).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert handle.clipped > 0
        found.append(outputs(model.eval(), images(8).float()).detach())
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)


def test_closures_are_clipped_after_they_ran() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipping = normprop.optim.AdaptiveGradientClipping(optimizer, clip=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 100 * weight.sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 400.0
    torch.testing.assert_close(weight.detach().norm(dim=1), torch.full((2,), 0.9 * 2**0.5))
    assert float(clipping.fraction) == 1.0


def test_micro_batches_are_one_step() -> None:
    found = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model, optimizer, handle = started(Residual(), OPTIMIZERS["momentum"])
        for seed in range(17):
            optimizer.zero_grad()
            for x in images(64)[seed : seed + 4].chunk(parts):
                (outputs(model, x).square().sum() / 20).backward()
            optimizer.step()
        assert handle.measured == [0, 16]
        found.append(outputs(model, images(8)))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


def test_an_average_keeps_its_function_and_the_network_s_constants() -> None:
    torch.manual_seed(0)
    model, optimizer, handle = started(Residual(), OPTIMIZERS["AdamW"])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    handle.follow(average)
    for seed in range(15):
        step(model, optimizer, seed)
        average.update_parameters(model)
    before = average(images(8))
    step(model, optimizer, 15)  # measures
    assert handle.measured == [0, 16]
    torch.testing.assert_close(average(images(8)), before, rtol=1e-8, atol=1e-8)
    for mine, theirs in zip(average.module.modules(), model.modules(), strict=True):
        if isinstance(mine, Site):
            torch.testing.assert_close(mine.scale, theirs.scale)
            torch.testing.assert_close(mine.shift, theirs.shift, atol=1e-8, rtol=1e-6)


def test_a_trained_network_keeps_its_function_and_a_fresh_head_is_calibrated() -> None:
    torch.manual_seed(0)
    network = Residual().double()
    for _ in range(3):
        network(images(64))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0.0, 0.3)
    before = network.eval()(images(8))
    model, _, handle = started(network, OPTIMIZERS["AdamW"])
    torch.testing.assert_close(model(images(8)), before, rtol=1e-6, atol=1e-6)
    assert "trained function kept" in repr(handle)
    nn.init.zeros_(network.bn2.bias)
    partly, _, handle = started(network, OPTIMIZERS["AdamW"])
    assert "1 fresh ones calibrated" in repr(handle)
    assert not bool(partly.get_parameter("bn2.bias").any())


def test_what_a_fresh_network_s_own_code_gave_to_its_offsets_stays() -> None:
    """timm's RepVGG draws γ and β at random: they say nothing of training."""
    torch.manual_seed(0)
    network = Residual().double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.1, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    model, optimizer, handle = started(network, OPTIMIZERS["AdamW"], samples=64)
    assert "β as it was initialised, calibrated" in repr(handle)
    torch.testing.assert_close(model.get_parameter("bn2.bias"), network.bn2.bias)
    report = normprop.inspect(model, images(64))
    for row in report:
        if row.operation == "Site":
            gamma = model.get_submodule(row.path).get_parameter("weight")
            torch.testing.assert_close(row.measured.std.flatten(), gamma.abs(), rtol=1e-6, atol=1e-6)
    step(model, optimizer, 0)
    handle.remove()
    before = model(images(8))
    again = normprop.keep_calibrated(model, torch.optim.AdamW(model.parameters(), lr=3e-3), images(64))
    assert "trained function kept" in repr(again)
    torch.testing.assert_close(model(images(8)), before)


class Mixed(nn.Module):
    """Convolutions of several kinds, each before a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ConvTranspose2d(8, 4, 2, stride=2),
             nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)]
        )  # fmt: skip
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 8, 4, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).relu()
        return x


def test_what_all_inputs_have_in_common_moves_an_output_no_more_than_other_things_do() -> None:
    """Where n inputs are one and the same, filters answer to it as to a direction of independent ones."""
    torch.manual_seed(0)
    model = normprop.convert(Mixed().double())
    optimizer = torch.optim.Adam(model.parameters())
    normprop.keep_calibrated(model, optimizer, images(32))
    for layer, site, inputs in zip(model.layers, model.norms, (27, 36, 32, 4, 9), strict=True):
        weight = layer.weight.detach()
        if isinstance(layer, nn.ConvTranspose2d):
            weight = weight.transpose(0, 1)
        rows = weight.flatten(1)
        assert rows.shape[1] == inputs
        rows = rows - site.center * rows.mean(1, keepdim=True)
        together, alone = rows.sum(1).square(), (weight.flatten(1).sum(1) / inputs**0.5).square()
        if isinstance(layer, nn.Conv2d) and layer.groups == 8:
            assert site.center == 0, "filters of one channel aren't centred"
        else:
            torch.testing.assert_close(together, alone, rtol=0.05 * inputs**0.5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_second_filter_starts_with_the_mean_that_it_was_given(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = Mixed().to(dtype)
    given = [layer.weight.detach().clone() for layer in network.layers]
    model = normprop.convert(network)
    normprop.keep_calibrated(model, torch.optim.Adam(model.parameters()), images(32).to(dtype))
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.01}
    for layer, site, before in zip(model.layers, model.norms, given, strict=True):
        form = Form(layer.groups if isinstance(layer, nn.modules.conv._ConvNd) else 1, isinstance(layer, nn.ConvTranspose2d))
        old, new = (to_rows(t, form).flatten(0, 1).double() for t in (before, layer.weight.detach()))
        means, found = old.mean(1, keepdim=True), new - site.center * new.mean(1, keepdim=True)
        kept = torch.ones_like(means) * (1 - site.center)
        if site.center:
            kept[::2] = 1.0
        torch.testing.assert_close(found, old - means + kept * means, **close)


class Reused(nn.Module):
    """Weights that several things read: two layers before sites, a layer without one, a second call, a product."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("tied", "other", "half_tied", "bare", "twice", "again", "read"):
            self.add_module(name, nn.Linear(8, 8))
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(6))
        self.other.weight, self.bare.weight = self.tied.weight, self.half_tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.tied(x)).relu()
        x = self.norms[1](self.other(x)).relu()
        x = self.norms[2](self.half_tied(x)).relu()
        x = self.norms[3](self.twice(x)).relu()
        x = self.norms[4](self.again(x)).relu()
        x = self.norms[5](self.read(x)).relu()
        return self.bare(x) + self.again(x) + x @ self.read.weight


def test_means_are_raised_once_and_where_nothing_but_sites_reads_them() -> None:
    torch.manual_seed(0)
    network = Reused()
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    model = normprop.convert(network)
    normprop.keep_calibrated(model, torch.optim.Adam(model.parameters()), torch.randn(32, 8))
    for name in ("tied", "half_tied", "twice", "again", "read"):
        old, new = before[f"{name}.weight"], model.get_parameter(f"{name}.weight").detach()
        raised = old.mean(1, keepdim=True) * (1 / (1 - model.norms[0].center) - 1)
        expected = old + (torch.arange(8)[:, None] % 2 == 0) * raised if name in ("tied", "twice") else old
        torch.testing.assert_close(new, expected, msg=name)


def test_a_weight_that_a_trained_site_reads_too_stays() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    network[3].weight = network[0].weight
    before = network[0].weight.detach().clone()
    model = normprop.convert(network)
    nn.init.uniform_(model[4].weight, 0.5, 2)
    nn.init.normal_(model[4].bias)
    normprop.keep_calibrated(model, torch.optim.Adam(model.parameters()), torch.randn(64, 8))
    assert 0 < model[1].center < 1
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", SMALL)
def test_every_second_filter_of_any_network_starts_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    make, shape = SMALL[name][:2]
    network, x = make().double(), torch.randn(16, *shape, dtype=torch.float64)
    before = {key: p.detach().clone() for key, p in network.named_parameters()}
    model = normprop.convert(network, example=x[:2], preserve=False)
    normprop.keep_calibrated(model, torch.optim.Adam(model.parameters()), x)
    lane = normprop.lane(model)
    weights = {entry["weight"]: entry for entry in lane.filters}
    for entry in lane.all_entries():
        key = f"{entry.layer}.weight"
        if key in weights and weights[key]["channel_dim"] == 0:
            site: Any = model.get_submodule(entry.site)
            kept, old = (t.detach().flatten(1) for t in (model.get_parameter(key), before[key]))
            kept = kept - site.center * kept.mean(1, keepdim=True)
            if site.center < 1:
                torch.testing.assert_close(kept[::2], old[::2], rtol=1e-9, atol=1e-12)
            means = (1 - site.center) * old[1::2].mean(1)
            torch.testing.assert_close(kept[1::2].mean(1), means, rtol=1e-9, atol=1e-12)


def test_how_far_filters_are_centred_goes_with_all_that_a_network_is_copied_to() -> None:
    torch.manual_seed(0)
    layers = [m for i in (8, 64) for m in (nn.Linear(i, 64), nn.BatchNorm1d(64), nn.ReLU())]
    network = nn.Sequential(*layers, nn.Linear(64, 2)).double()
    x = torch.randn(512, 8, dtype=torch.float64)
    model = normprop.convert(copy.deepcopy(network))
    average = AveragedModel(model)
    optimizer = torch.optim.Adam(model.parameters())
    handle = normprop.keep_calibrated(model, optimizer, x, samples=512)
    assert (model[1].center, model[4].center) == (165 / 256, 1 - 1 / 8)
    handle.follow(average)
    other = normprop.convert(copy.deepcopy(network))
    other.load_state_dict(model.state_dict())
    for again in (other, copy.deepcopy(model), normprop.fold(model)):
        torch.testing.assert_close(again(x), model(x), rtol=1e-10, atol=1e-10)
    assert average.module[4].center == model[4].center


@pytest.mark.parametrize(
    ("converted", "kept", "center"),
    [({}, {"center": False}, 1.0), ({"center": True}, {}, 1.0), ({"center": 0.5}, {}, 0.5), ({"center": False}, {}, 0.0),
     ({"center": False}, {"center": True}, 0.0), ({"center": True}, {"center": True}, 0.875), ({}, {}, 0.875)],
)  # fmt: skip
def test_filters_keep_part_of_their_mean_where_nobody_said_how_far_to_centre(
    converted: dict[str, Any], kept: dict[str, Any], center: float
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()
    )
    model = normprop.convert(network, **converted)
    normprop.keep_calibrated(model, torch.optim.Adam(model.parameters()), torch.randn(64, 8), **kept)
    assert model[4].center == center


def test_a_trained_network_is_centred_no_further() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64))
    network(torch.randn(64, 8))  # has statistics now
    for norm in (network[1], network[4]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    x = torch.randn(64, 8)
    model = normprop.convert(network.eval())
    expected = model(x)
    normprop.keep_calibrated(model, torch.optim.Adam(model.parameters()), x)
    assert model[4].center == 0
    torch.testing.assert_close(model(x), expected)


def test_gains_and_offsets_go_without_decay() -> None:
    model = normprop.convert(Residual().double())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.5)
    handle = normprop.keep_calibrated(model, optimizer, images(64), decay=False, every=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
        group["params"] = [p for p in group["params"] if p.requires_grad]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    scheduler.step()
    sites = {name for name, m in model.named_modules() if isinstance(m, Site)}
    for name, p in model.named_parameters():
        decayed = p.requires_grad and name.rpartition(".")[0] not in sites and bool(before[name].any())
        assert torch.equal(p, before[name]) != decayed, name
    assert handle.step == 1
    again = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(again, lambda _: 1.0)
    with pytest.raises(NormPropError, match="before the scheduler"):
        normprop.keep_calibrated(model, again, images(64), decay=False)


def test_compiled_networks_and_matrix_optimizers() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
    model = normprop.convert(network)
    compiled = torch.compile(model, backend="aot_eager")
    model.compile(backend="aot_eager")
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.requires_grad]
    matrix = torch.optim.Muon([p for n, p in model.named_parameters() if n.endswith("weight") and p.dim() == 2], lr=0.01)
    others = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad and p.dim() == 1], lr=0.01)
    handle = normprop.keep_calibrated(compiled, [matrix, others], torch.randn(64, 12))
    assert len(matrices) >= 2
    x = torch.randn(40, 12)
    for i in range(18):
        for optimizer in (matrix, others):
            optimizer.zero_grad()
        compiled(x[i : i + 2]).square().mean().backward()
        for optimizer in (matrix, others):
            optimizer.step()
    assert handle.measured == [0, 16]
    torch.testing.assert_close(compiled(x), model(x))
    assert repr(handle).count("AdamW clipped") == 1


def test_data_of_every_kind() -> None:
    x = images(64)
    kinds: list[Any] = [x, [x[:32], x[32:]], [(x, torch.zeros(64))], lambda step: x[step : step + 16], iter([x]), None]
    for data in kinds:
        model = normprop.convert(Residual().double())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        handle = normprop.keep_calibrated(model, optimizer, data)
        for seed in range(17):
            step(model, optimizer, seed)
        assert handle.measured == ([] if data is None else [0, 16])


def test_bad_input() -> None:
    model = normprop.convert(Residual().double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(NormPropError, match="that convert made"):
        normprop.keep_calibrated(Residual(), optimizer, images(4))
    with pytest.raises(NormPropError, match="no parameter of this network"):
        normprop.keep_calibrated(model, torch.optim.SGD(Residual().parameters(), lr=0.1), images(4))
    for data in ([], images(4)[:0], 3):
        with pytest.raises(NormPropError):
            normprop.keep_calibrated(model, optimizer, data)
    for options in ({"samples": 0}, {"directions": -1}, {"every": -1}, {"clip": -0.1}):
        with pytest.raises(NormPropError, match="too small"):
            normprop.keep_calibrated(model, optimizer, images(4), **options)


def share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(normprop.convert(Residual()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(rank)
        handle = normprop.keep_calibrated(model, optimizer, torch.randn(16, 3, 8, 8) * (1 + rank))
        for _ in range(17):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        assert handle.measured == [0, 16]
        values = [v.float() for p in model.parameters() for v in (p.detach(), *optimizer.state.get(p, {}).values())]
        mine = torch.cat([v.flatten() for v in values])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(*both)
    finally:
        dist.destroy_process_group()


def test_processes_share_what_the_first_one_measured(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(share, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
