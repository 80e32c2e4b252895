"""Directions against what an eigendecomposition of the unfolded covariance gives, and what they are for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normprop
from normprop import NormPropError
from normprop.sites import directions as module
from normprop.sites.directions import principal_directions
from normprop.sites.rows import Form, Operands, to_rows
from normprop.sites.site import Site
from tests.test_calibrate import images
from tests.zoo import Residual

DOUBLE = torch.float64


def patches(x: Tensor, size: int, options: dict[str, Any]) -> Tensor:
    """What each filter of an ungrouped convolution sees, ``(fan-in, patches)``, its mean taken away."""
    seen = F.unfold(x, size, padding=options["padding"], stride=options["stride"], dilation=options["dilation"])
    seen = seen.transpose(0, 1).flatten(1)
    return seen - seen.mean(1, keepdim=True)


def operands(weight: Tensor, var: Tensor | None) -> Operands:
    ones = torch.ones(len(weight), dtype=DOUBLE)
    return Operands(weight, None, var, ones, ones, ones, ones)


@pytest.mark.parametrize("center", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "stride": 1, "dilation": 1},
        {"padding": 0, "stride": 2, "dilation": 1},
        {"padding": 2, "stride": 1, "dilation": 2},
    ],
    ids=str,
)
def test_they_are_those_of_the_unfolded_covariance(options: dict[str, Any], groups: int, center: float) -> None:
    x = torch.cat([images(40), images(40).flip(2) + 0.5 * images(40).roll(1, 1)], 1) + 0.3
    x += 0.2 * torch.randn(x.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    var = x.var((0, 2, 3)) * torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 3.0], dtype=DOUBLE)
    weight = torch.empty(4 * groups, 6 // groups, 3, 3, dtype=DOUBLE)
    form = Form(groups, center=center)
    layer = lambda filters, batch: F.conv2d(x[8 * batch : 8 * batch + 8], filters, groups=groups, **options)
    found = principal_directions(layer, 5, form, operands(weight, var), 3, channel=1)
    assert found is not None
    assert found.shape == (3 * groups, 6 // groups, 3, 3)
    for group, rows in enumerate(to_rows(found, form)):
        channels = slice(group * 6 // groups, (group + 1) * 6 // groups)
        seen = patches(x[:, channels], 3, options)
        inverse = var[channels].repeat_interleave(9).rsqrt()
        covariance = inverse[:, None] * (seen @ seen.T / seen.shape[1]) * inverse
        if center == 1:
            normal = inverse / inverse.norm()
            keep = torch.eye(len(normal), dtype=DOUBLE) - normal.outer(normal)
            covariance = keep @ covariance @ keep
        values = torch.linalg.eigvalsh(covariance)
        others = values[int(center) : -3].mean()
        for i, direction in enumerate(rows):
            length = (values[-1 - i] / others - 1).sqrt()
            assert float(direction.norm() / length) == pytest.approx(1, abs=0.1), "the mean of the others is estimated"
            unit = direction / direction.norm()  # eigenvectors whose values are close may be turned into each other
            assert float(unit @ covariance @ unit / values[-1 - i]) == pytest.approx(1, abs=0.05)


def test_a_shrunken_covariance_adds_its_part_of_the_variance() -> None:
    networks = {}
    for shrinkage in (0.0, 0.75, 1.0):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        networks[shrinkage] = normprop.calibrate(normprop.convert(block.double()), images(96), shrinkage=shrinkage)
    whole, part, none = (dict(model.named_parameters()) for model in networks.values())
    assert torch.allclose(part["1.directions"], 0.5 * whole["1.directions"])
    assert not networks[1.0].get_parameter("1.directions").any()
    # k V is what was measured in any case, so that 1/k is V up to a constant.
    full, quarter, nothing = (1 / one["1.scale"] for one in (whole, part, none))
    assert torch.allclose(quarter, 0.25 * full + 0.75 * nothing)
    for model in networks.values():
        assert torch.allclose(model(images(96)), networks[0.0](images(96)))


@pytest.mark.parametrize("inputs", range(2, 13))
def test_directions_of_small_filters_are_eigenvectors(inputs: int) -> None:
    """Where as many are followed as there are, nothing is iterated: their covariance is exact."""
    torch.manual_seed(inputs)
    x = torch.randn(200, inputs, dtype=DOUBLE) @ torch.randn(inputs, inputs, dtype=DOUBLE)
    values, vectors = torch.linalg.eigh(x.T.cov(correction=0))
    kept = min(8, inputs - 1)
    rest = values[: inputs - kept].mean()
    given = operands(torch.empty(5, inputs, dtype=DOUBLE), None)
    found = principal_directions(lambda filters, _: F.linear(x, filters), 1, Form(), given, 8, channel=-1)
    assert found is not None
    mean = values.mean()
    excess = values.flip(0)[:kept] / torch.maximum(rest, 0.01 * mean) - 1
    expected = vectors.flip(1)[:, :kept] * excess.clamp(min=0).sqrt()
    torch.testing.assert_close(found.T @ found, expected @ expected.T, rtol=1e-8, atol=1e-8 * float(excess.max()))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("center", [0.0, 0.75, 1.0])
def test_measured_whole_and_iterated_they_are_the_same(groups: int, center: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several batches of several samples, and with a channel that doesn't vary."""
    generator = torch.Generator().manual_seed(1)
    x = F.avg_pool2d(torch.randn(6, 4, 12, 12, dtype=DOUBLE, generator=generator), 3, 1) + 0.5
    x[:, 1] = 2.0
    var = torch.tensor([0.1, 0.0, 0.2, 0.3], dtype=DOUBLE)
    weight = torch.empty(8, 4 // groups, 3, 2, dtype=DOUBLE)
    layer = lambda filters, batch: F.conv2d(x[3 * batch :][:3], filters, groups=groups, padding=1)
    form, given = Form(groups, center=center), operands(weight, var)
    found = []
    for room in (module._ROOM, 0):
        monkeypatch.setattr(module, "_ROOM", room)
        monkeypatch.setattr(module, "_ROUNDS", 60)
        one = principal_directions(layer, 2, form, given, 2, channel=1)
        assert one is not None
        rows = to_rows(one, form)
        found.append(rows.mT @ rows)
    whole, iterated = found
    if groups == 1:  # what is left of many is estimated where they are iterated
        whole, iterated = (F.normalize(t.flatten(), dim=0) for t in (whole, iterated))
    torch.testing.assert_close(whole, iterated, rtol=0, atol=0.02 if groups == 1 else 1e-6)


def test_filters_too_small_for_any_have_none() -> None:
    x = torch.randn(50, 3, dtype=DOUBLE)
    layer = lambda filters, _: F.linear(x[:, : filters.shape[1]], filters)
    for inputs, center, count in ((1, 0.0, 0), (2, 1.0, 0), (3, 1.0, 1), (3, 0.75, 2), (3, 0.0, 2)):
        given = operands(torch.empty(5, inputs, dtype=DOUBLE), None)
        found = principal_directions(layer, 1, Form(center=center), given, 8, channel=-1)
        assert (0 if found is None else len(found)) == count


def test_an_input_that_does_not_vary_gives_nothing() -> None:
    x = torch.ones(50, 6, dtype=DOUBLE)
    given = operands(torch.empty(5, 6, dtype=DOUBLE), torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=DOUBLE))
    found = principal_directions(lambda filters, _: F.linear(x, filters), 1, Form(), given, 2, channel=-1)
    assert found is not None
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("depth", [1, 4])
def test_the_variance_is_right_for_filters_that_came_later(depth: int) -> None:
    """What directions are for: filters turn after calibration, and V is to know what that does."""
    errors = {}
    for directions in (0, 8):
        torch.manual_seed(0)
        blocks = [
            m for i in range(depth) for m in (nn.Conv2d(8 if i else 3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        ]
        model = normprop.calibrate(normprop.convert(nn.Sequential(*blocks).double()), images(96, 20), directions=directions)
        last = model.get_submodule(str(3 * depth - 3))
        with torch.no_grad():
            smooth = F.avg_pool2d(last.weight, 3, 1, 1)
            last.weight.copy_(smooth - smooth.mean((1, 2, 3), keepdim=True))
        row = [row for row in normprop.inspect(model, images(96, 20)) if row.operation == "Conv2d"][-1]
        errors[directions] = float((row.measured.var / row.predicted.var).log().abs().mean())
    assert errors[8] < 0.5 * errors[0]


def test_a_calibrated_network_is_saved_loaded_copied_and_folded() -> None:
    make = lambda: normprop.convert(Residual().double())
    model = normprop.calibrate(make(), images(16))
    state = model.state_dict()
    fresh = make()
    fresh.load_state_dict(state)
    x = images(4)
    torch.testing.assert_close(fresh(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    torch.testing.assert_close(normprop.fold(model)(x), model(x))
    fresh.load_state_dict(make().state_dict())
    sites = [site for site in fresh.modules() if isinstance(site, Site)]
    assert all(site.directions is None or not site.directions.any() for site in sites)


def test_part_of_a_state_leaves_directions_alone() -> None:
    model = normprop.calibrate(normprop.convert(Residual().double()), images(16))
    model.load_state_dict({"fc.bias": torch.ones(5)}, strict=False)
    assert any(site.directions is not None for site in model.modules() if isinstance(site, Site))


class Twice(nn.Module):
    """A layer and its normaliser used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.norm(self.conv(torch.relu(self.norm(self.conv(x)))))


def test_each_call_of_a_site_has_its_own() -> None:
    torch.manual_seed(0)
    model = normprop.calibrate(normprop.convert(Twice().double()), images(32), directions=3)
    directions = model.get_parameter("norm.directions")
    assert directions.shape == (2, 3, 6, 3, 3)
    assert not torch.allclose(directions[0], directions[1])
    rows = [row for row in normprop.inspect(model, images(32)) if row.operation == "Conv2d" and row.path == "conv"]
    assert len(rows) == 2
    for row in rows:
        assert float((row.measured.var - 1).abs().max()) < 1e-6
    assert not normprop.calibrate(model, images(32), directions=0).get_parameter("norm.directions").any()


def test_training_moves_no_directions_and_gradients_are_those_of_the_function() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    )
    model = normprop.calibrate(normprop.convert(block.double()), images(16), directions=2)
    assert not any(p.requires_grad for k, p in model.named_parameters() if k.endswith("directions"))
    x = images(3)
    trained = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters() if p.requires_grad}

    def function(*values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, dict(zip(trained, values, strict=True)), (x,))
        return out.mean((2, 3))

    assert torch.autograd.gradcheck(function, tuple(trained.values()))


def test_bad_input() -> None:
    with pytest.raises(NormPropError, match="0 or more"):
        normprop.calibrate(normprop.convert(Residual()), images(4).float(), directions=-1)
    for shrinkage in (-0.1, 1.1, float("nan")):
        with pytest.raises(NormPropError, match=f"shrinkage is {shrinkage}"):
            normprop.calibrate(normprop.convert(Residual()), images(4).float(), shrinkage=shrinkage)


def test_a_calibrated_network_is_compiled_exported_and_pickled() -> None:
    torch.manual_seed(0)
    model = normprop.calibrate(normprop.convert(Residual()), images(16).float(), directions=2)
    x = images(4).float()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model.eval(), (x,)).module()(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
