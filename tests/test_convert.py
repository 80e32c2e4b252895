from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normprop
from normprop import Moments, NormPropError, UnsupportedOpError
from normprop.sites.site import Site
from tests.zoo import SMALL, Residual, mlp, outputs, randomise


def chain(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))


def reference(model: nn.Module, x: Tensor, *, center: float) -> Tensor:
    """The chain written out: E = Σ W m, V = Σ W² v, u = γ (z − E)/√V + β, (m, v) of ReLU at N(β, γ²)."""
    conv1, bn1, _, conv2, bn2 = model
    m, v = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    for conv, bn in ((conv1, bn1), (conv2, bn2)):
        w = conv.weight
        w = torch.stack([f - center * f.mean() for f in w])
        mean = torch.stack([sum((f[i] * m[i]).sum() for i in range(len(f))) for f in w])
        var = torch.stack([sum((f[i] ** 2 * v[i]).sum() for i in range(len(f))) for f in w])
        z = F.conv2d(x, w)
        x = (z - mean[:, None, None]) / var.sqrt()[:, None, None] * bn.weight[:, None, None] + bn.bias[:, None, None]
        if conv is conv1:
            x = x.relu()
            beta, gamma = bn.bias, bn.weight.abs()
            t, normal = beta / gamma, torch.distributions.Normal(0.0, 1.0)
            cdf, pdf = normal.cdf(t), normal.log_prob(t).exp()
            m = beta * cdf + gamma * pdf
            v = (beta**2 + gamma**2) * cdf + beta * gamma * pdf - m**2
    return x


@pytest.mark.parametrize("center", [True, 0.75, False])
def test_it_computes_what_the_method_says(center: float) -> None:
    torch.manual_seed(0)
    model = randomise(chain()).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    converted = normprop.convert(model, preserve=False, center=center)
    found, expected = converted(x), reference(model, x, center=center)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name in ("0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias"):
        torch.testing.assert_close(
            converted.get_parameter(name).grad, model.get_parameter(name).grad, rtol=1e-9, atol=1e-9, msg=name
        )


def test_the_argument_stays_as_it_was() -> None:
    model = randomise(Residual())
    before = copy.deepcopy(model.state_dict())
    modules, mode = dict(model.named_modules()), model.training
    normprop.convert(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert model.training is mode
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_keys_are_the_models_own(name: str) -> None:
    model = SMALL[name][0]()
    statistics = {
        k for k in model.state_dict() if k.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
    }
    converted = normprop.convert(model)
    before, after = set(model.state_dict()), set(converted.state_dict())
    assert before - after == statistics
    constants = {k.rpartition(".")[2] for k in after - before}
    assert {"shift", "scale", "record"} <= constants <= {"shift", "scale", "record", "directions"}
    for key in before & after:
        assert converted.state_dict()[key].shape == model.state_dict()[key].shape
    assert not any(converted.get_parameter(key).requires_grad for key in after - before)
    assert not list(converted.buffers())


def test_paths_and_containers_stay() -> None:
    converted = normprop.convert(Residual())
    assert isinstance(converted.stem[0], nn.Conv2d)
    assert converted.conv1.weight is dict(converted.named_parameters())["conv1.weight"]
    converted.fc = nn.Linear(16, 2)
    assert converted(torch.randn(1, 3, 8, 8)).shape == (1, 2)
    assert copy.deepcopy(converted).stem[0].weight.shape == converted.stem[0].weight.shape


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x * torch.tensor([[[2.0]]])))


def test_a_tensor_written_in_forward_comes_along() -> None:
    model, x = randomise(Literal()).eval(), torch.randn(2, 3, 4, 4)
    converted = normprop.convert(model)
    for form in (converted, copy.deepcopy(converted), normprop.fold(converted)):
        torch.testing.assert_close(form(x), model(x), rtol=1e-4, atol=1e-5)


def test_children_by_position() -> None:
    assert isinstance(normprop.convert(chain())[0], nn.Conv2d)


def test_a_fresh_network_is_standardised_at_every_site() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Linear(256, 256), nn.BatchNorm1d(256), nn.GELU()]
    report = normprop.inspect(normprop.convert(nn.Sequential(*layers)), torch.randn(512, 256))
    sites = [row for row in report if row.operation == "Linear"]
    assert len(sites) == 12
    for row in sites:
        assert abs(float(row.measured.var.mean()) - 1) < 0.25


def test_preserve_is_automatic() -> None:
    fresh, trained = chain(), randomise(chain())
    assert torch.equal(normprop.convert(fresh).get_parameter("1.scale"), torch.ones(8))
    kept = normprop.convert(trained)
    assert not torch.equal(kept.get_parameter("1.scale"), torch.ones(8))
    assert torch.equal(normprop.convert(trained, preserve=False).get_parameter("1.scale"), torch.ones(8))
    centred = lambda model: [m.center for m in model.modules() if isinstance(m, Site)]
    assert all(centred(normprop.convert(fresh)))
    assert not any(centred(kept))


def test_filters_with_one_input_channel_are_never_centred() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
                          nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4))  # fmt: skip
    with pytest.warns(UserWarning, match="one input channel are not centred: 0, 4"):
        asked = normprop.convert(model, center=True)
    centred = lambda model: {path for path, m in model.named_modules() if isinstance(m, Site) and m.center}
    assert centred(asked) == centred(normprop.convert(model)) == {"3"}


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_how_far_filters_are_centred_goes_with_the_state(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8, dtype=kind)
    model = normprop.convert(chain().to(kind), center=0.3)
    normprop.calibrate(model, x)
    other = normprop.convert(chain().to(kind), center=False)
    other.load_state_dict(model.state_dict())
    assert [m.center for m in other.modules() if isinstance(m, Site)] == [77 / 256] * 2
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    if kind == torch.float64:
        torch.testing.assert_close(normprop.fold(model)(x), model(x), rtol=1e-10, atol=1e-10)


def test_an_untrained_network_can_be_kept_too() -> None:
    model, x = chain().eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(normprop.convert(model, preserve=True)(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_shared_site_keeps_each_of_its_calls() -> None:
    torch.manual_seed(0)
    model = randomise(SMALL["shared"][0]()).double().eval()
    converted = normprop.convert(model)
    assert converted.bn.shift.shape == (2, 3)
    assert not torch.equal(converted.bn.scale[0], converted.bn.scale[1])
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(converted(x)["out"], model(x)["out"])


def test_an_auxiliary_head_is_there_while_training() -> None:
    converted = normprop.convert(SMALL["shared"][0]())
    x = torch.randn(1, 3, 8, 8)
    assert set(converted.train()(x)) == {"out", "aux"}
    assert set(converted.eval()(x)) == {"out"}
    assert set(copy.deepcopy(converted).train()(x)) == {"out", "aux"}


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1}], ids=str
)
def test_every_kind_of_batch_norm(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = randomise(chain(**options)).double().eval()
    converted = normprop.convert(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    if "track_running_stats" not in options:
        torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(converted(x)[:1], converted(x[:1]))


def test_frozen_parameters_stay_frozen() -> None:
    model = chain()
    model[1].requires_grad_(False)
    converted = normprop.convert(model)
    assert not converted.get_parameter("1.weight").requires_grad
    assert converted.get_parameter("4.weight").requires_grad


def test_bfloat16_keeps_its_type() -> None:
    model = randomise(chain()).bfloat16().eval()
    x = torch.randn(2, 3, 8, 8)
    found = normprop.convert(model)(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert float((found.float() - model.float()(x)).detach().abs().max()) < 0.2


def test_meta_device() -> None:
    with torch.device("meta"):
        model = chain()
    assert normprop.convert(model)(torch.empty(1, 3, 8, 8, device="meta")).shape == (1, 4, 4, 4)


def test_a_bias_that_the_site_takes_away_is_kept_but_frozen() -> None:
    converted = normprop.convert(chain())
    assert not converted.get_parameter("0.bias").requires_grad


def test_normalize_all_gives_a_site_to_every_inner_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    ).double()
    converted = normprop.convert(model, normalize="all")
    assert {n for n, m in converted.named_modules() if isinstance(m, Site)} == {"0.site", "2.site", "4.site"}
    assert set(model.state_dict()) <= set(converted.state_dict())
    report = normprop.inspect(converted, torch.randn(2000, 20, dtype=torch.float64))
    for row in report:
        if row.operation == "Linear" and row.path != "6":
            assert abs(float(row.measured.var.mean()) - 1) < 0.2


def test_normalize_all_can_keep_the_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    converted = normprop.convert(model, normalize="all", preserve=True)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(converted(x), model(x))


def test_input_moments_are_used_and_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).double()
    x = torch.randn(4000, 6, dtype=torch.float64) * 5 + torch.arange(6.0, dtype=torch.float64)
    converted = normprop.convert(model, normprop.InputStats.from_tensor(x))
    out = converted(x).detach()
    assert float(out.mean(0).abs().max()) < 0.1
    assert float((out.var(0) - 1).abs().max()) < 0.1
    again = copy.deepcopy(converted)
    torch.testing.assert_close(again(x), out)


def test_the_paper_form_is_the_papers_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 2, 3, padding=1),
    ).double()
    converted = normprop.convert(model, method="paper")
    assert converted.get_parameter("1.weight")[0].item() == pytest.approx(1 / 1.211174, rel=1e-5)
    layers = nn.Sequential(
        normprop.nn.Conv2d(3, 8, 3, padding=1, activation="relu", method="paper"),
        nn.MaxPool2d(2),
        normprop.nn.Conv2d(8, 8, 3, activation="relu", method="paper"),
        nn.Conv2d(8, 2, 3, padding=1),
    ).double()
    with torch.no_grad():
        for layer, (conv, bn) in zip((layers[0], layers[2]), (("0", "1"), ("4", "5")), strict=True):
            layer.weight.copy_(converted.get_parameter(f"{conv}.weight"))
            layer.gain.copy_(converted.get_parameter(f"{bn}.weight"))
            layer.bias.copy_(converted.get_parameter(f"{bn}.bias"))
        layers[3].load_state_dict(model[7].state_dict())
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(converted(x), layers(x))
    norms = converted.get_parameter("0.weight").flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_the_paper_form_of_a_network_that_activates_before_it_weighs() -> None:
    """Its layers read constants of activations alone, which are no tensors of the network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.1), nn.Conv2d(8, 2, 3)
    )
    converted = normprop.convert(model.double(), method="paper")
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = x * converted.get_parameter("0.weight").reshape(-1, 1, 1)
    for layer, norm, slope in (("2", "3", 0.0), ("5", None, 0.1)):
        mean = (1 - slope) / math.sqrt(2 * math.pi)
        std = math.sqrt(((1 + slope**2) - (1 - slope) ** 2 / math.pi) / 2)  # remark 2
        weight, bias = (converted.get_parameter(f"{layer}.{name}") for name in ("weight", "bias"))
        expected = F.conv2d((F.leaky_relu(expected, slope) - mean) / std, weight)
        if norm is None:
            expected = expected + bias.reshape(-1, 1, 1)
        else:
            expected = expected * converted.get_parameter(f"{norm}.weight").reshape(-1, 1, 1)
    torch.testing.assert_close(converted(x), expected)
    converted(x).square().sum().backward()


class WithState(nn.Module):
    """A recurrence that starts from zeros, in front of which stands a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.state = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.end = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.inner(x)))
        state = torch.zeros_like(x)
        for _ in range(2):
            state = torch.tanh(x + self.state(F.relu(state)))
        return self.end(state)


def test_the_paper_form_of_a_layer_that_reads_a_constant() -> None:
    torch.manual_seed(0)
    converted = normprop.convert(WithState().double(), method="paper")
    x = torch.randn(5, 4, dtype=torch.float64)
    converted(x).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in converted.parameters() if p.grad is not None)
    torch.testing.assert_close(converted(x)[:1], converted(x[:1]))


def test_a_filter_of_zeros_is_not_nan() -> None:
    for options in ({}, {"method": "paper"}):
        converted = normprop.convert(chain(), **options)
        with torch.no_grad():
            converted.get_parameter("0.weight")[0].zero_()
            converted.get_parameter("1.weight")[1].zero_()
        converted(torch.randn(2, 3, 8, 8)).square().sum().backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in converted.parameters() if p.grad is not None)


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x) if bool(x.sum() > 0) else x


def with_custom() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Custom(), nn.Linear(4, 4), nn.BatchNorm1d(4))


def test_control_flow_on_values_is_recorded_on_real_tensors() -> None:
    with pytest.raises(UnsupportedOpError, match=r"(?s)bessel_j0.*test_convert\.py"):
        normprop.convert(
            with_custom(), normprop.Moments(torch.full((4,), 9.0), torch.ones(4)), example=torch.full((8, 4), 9.0)
        )


def test_a_leaf_without_a_rule_is_named_and_can_be_given_one() -> None:
    with pytest.raises(UnsupportedOpError, match=r"(?s)Custom in 2.*@normprop\.rule"):
        normprop.convert(with_custom(), leaf_modules=(Custom,))
    converted = normprop.convert(
        with_custom(), leaf_modules=(Custom,), rules={Custom: lambda module, x: Moments(x.mean, x.var)}
    )
    assert converted(torch.randn(1, 4)).shape == (1, 4)


class ExoticHead(nn.Module):
    """What follows the last site has no rules at all; what stands in front of one may."""

    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.lstm, self.inner = nn.LSTM(8, 4, batch_first=True), inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(torch.cumsum(x, 1) if self.inner else x)
        boxes = torch.topk(torch.sort(x.flatten(2), dim=2).values, 3).indices.cumsum(1)
        return {"boxes": boxes, "state": self.lstm(x.mean(3).transpose(1, 2))[0]}


def test_only_what_sites_depend_on_needs_rules() -> None:
    model, x = randomise(ExoticHead()).eval(), torch.randn(2, 3, 9, 9)
    converted = normprop.convert(model)
    for key, value in model(x).items():
        torch.testing.assert_close(converted(x)[key], value, rtol=1e-4, atol=1e-4)
    normprop.calibrate(normprop.convert(model, preserve=False), x)
    torch.testing.assert_close(normprop.fold(converted)(x)["state"], model(x)["state"], rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedOpError, match=r"operations without a moment rule.*LSTM"):
        normprop.propagate(model)
    with pytest.raises(UnsupportedOpError, match=r"operations without a moment rule.*LSTM"):
        normprop.propagate(converted)


def test_operations_in_front_of_a_site_need_rules() -> None:
    with pytest.raises(UnsupportedOpError) as caught:
        normprop.convert(ExoticHead(inner=True))
    assert caught.value.operations == ("torch.cumsum",)


class DynamicLayers(nn.Module):
    """Weights that are computed from the input, as functions and by keyword, and a power of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.to_weight = nn.BatchNorm2d(4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.to_weight(x.mean((0, 2, 3)))
        x = F.conv2d(x, weight=weight.reshape(4, 4, 1, 1)) + F.conv_transpose2d(x, weight.reshape(4, 4, 1, 1))
        x = F.linear(x.transpose(1, 3), weight.reshape(4, 4)).transpose(1, 3)
        return self.norm(torch.cumsum(x, 1))


def test_layers_with_weights_from_the_input_are_refused_with_all_else() -> None:
    with pytest.raises(UnsupportedOpError, match="its weight depends on the input") as caught:
        normprop.convert(DynamicLayers())
    assert len(caught.value.operations) == 4
    assert "test_convert.py:" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (chain, {"method": "other"}, "none of 'exact', 'paper'"),
        (lambda: randomise(chain()), {"center": True}, "centring changes"),
        (lambda: randomise(chain()), {"method": "paper"}, "no constants that could keep"),
        (lambda: randomise(chain()), {"center": 0.5}, "centring changes"),
        (chain, {"method": "paper", "center": True}, "does not centre"),
        (chain, {"method": "paper", "center": 0.5}, "does not centre"),
        (chain, {"center": 1.5}, "a number from 0 to 1"),
        (chain, {"center": -0.5}, "a number from 0 to 1"),
        (chain, {"center": float("nan")}, "a number from 0 to 1"),
        (chain, {"center": "half"}, "a number from 0 to 1"),
        (lambda: chain(track_running_stats=False), {"preserve": True}, "no running statistics"),
        (lambda: nn.Linear(3, 3), {}, "no BatchNorm"),
        (lambda: normprop.convert(chain()), {}, "converted already"),
        (lambda: nn.Sequential(normprop.convert(chain())), {}, "converted already"),
        (lambda: nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)), {}, "Run one batch"),
        (lambda: "resnet", {}, "takes a torch.nn.Module"),
        (chain, {"input": Moments(torch.zeros(4), torch.ones(4))}, r"takes samples of shape"),
        (chain, {"input": Moments(torch.zeros(3), -torch.ones(3))}, "negative"),
        (chain, {"input": Moments(torch.zeros(3), torch.zeros(3))}, "zero"),
        (chain, {"input": Moments(torch.zeros(3), torch.full((3,), float("nan")))}, "NaN"),
    ],
)
def test_bad_input(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NormPropError, match=message):
        normprop.convert(make(), **options)


def test_the_gradient_flows_through_the_moments() -> None:
    torch.manual_seed(0)
    model = normprop.convert(nn.Sequential(*chain(), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)).double())
    with torch.no_grad():
        model.get_parameter("1.bias").normal_()
    site, after = model.get_parameter("1.bias"), model.get_parameter("3.weight")
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    out = outputs(model(x))[0].square().sum()
    assert all(g is not None and bool((g != 0).any()) for g in torch.autograd.grad(out, [site, after]))
    assert torch.autograd.gradcheck(
        lambda b: torch.func.functional_call(model, {"1.bias": b}, (x,)), (site.detach().requires_grad_(),)
    )


def test_dropout_does_not_touch_the_lane() -> None:
    assert "dropout" not in normprop.lane(normprop.convert(mlp())).code.lower()
