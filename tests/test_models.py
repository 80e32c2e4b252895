"""Every network with every normaliser: shapes, structure, and the errors for what doesn't go together."""

import math

import pytest
import torch
from torch import nn

from normprop.errors import NormPropError
from normprop.lab.networks.baselines import measure_once
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import NORMALIZERS, normalizer, realize

NETS = ["nin", "mlp", "plain12", "resnet8"]


def network(name, norm="batch", shape=(3, 16, 16), classes=7, width=0.25):
    torch.manual_seed(0)
    return build(name, shape=shape, classes=classes, norm=normalizer(norm), width=width)


@pytest.mark.parametrize("norm", NORMALIZERS)
@pytest.mark.parametrize("name", NETS)
def test_every_network_trains_with_every_normaliser(name, norm):
    if name == "mlp" and normalizer(norm).images_only:
        with pytest.raises(NormPropError, match="needs images"):
            network(name, norm)
        return
    net = realize(network(name, norm), normalizer(norm), (3, 16, 16))
    scores = net(torch.randn(4, 3, 16, 16))
    assert scores.shape == (4, 7)
    scores.square().sum().backward()
    trainable = {key: p for key, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable.values())
    assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()) == (norm in ("batch", "frozen"))


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        (name, norm)
        for name in NETS
        for norm in NORMALIZERS
        if NORMALIZERS[norm].smallest_batch == 1 and not (name == "mlp" and NORMALIZERS[norm].images_only)
    ],
)
def test_normalisers_that_claim_it_treat_samples_alone(name, norm):
    net = realize(network(name, norm), normalizer(norm), (3, 16, 16))
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "layer", "per_network"),
    [
        ("ws", "StdConv2d", 9),
        ("frn", "FilterResponseNormTlu2d", 9),
        ("evonorm-s0", "EvoNorm2dS0", 9),
        ("nf", "ScaledStdConv2d", 9),
        ("weight", "ParametrizedConv2d", 9),
        ("none-zero", "LayerScale2d", 3),
    ],
)
def test_baselines_are_those_of_timm_and_torch(norm, layer, per_network):
    kinds = [type(m).__name__ for m in network("resnet8", norm).modules()]
    assert kinds.count(layer) == per_network


@pytest.mark.parametrize("norm", ["nf", "weight"])
def test_what_is_normalised_by_initialisation_keeps_the_scale(norm):
    net = network("resnet110", norm, shape=(3, 16, 16), width=1.0)
    end = {"nf": net.stages, "weight": net.stages[0]}[norm]
    found = []
    end.register_forward_hook(lambda module, inputs, output: found.append(output.detach()))
    net(torch.randn(8, 3, 16, 16))
    assert 0.2 < found[0].square().mean() < 5


def test_scaled_blocks_know_the_standard_deviation_of_their_input():
    net, found, predicted = network("resnet20", "nf", shape=(3, 32, 32), width=1.0).double(), [], []
    for stage in net.stages:
        for block in stage:
            predicted.append(block.beta)
            block.register_forward_hook(lambda module, inputs, output: found.append(float(inputs[0].detach().std())))
    net(torch.randn(16, 3, 32, 32, dtype=torch.float64))
    assert predicted[:5] == pytest.approx([1, 1.04**0.5, 1.08**0.5, 1.12**0.5, 1.04**0.5])
    # The stem sees no ReLU, so the gain that makes up for one stays in everything behind it.
    stem_gain = math.sqrt(2 / (1 - 1 / math.pi))
    assert found == pytest.approx([stem_gain * std for std in predicted], rel=0.15)


def test_an_empty_branch_leaves_the_skip():
    block = network("resnet8", "none-zero").stages[0][0]
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_frozen_statistics_are_measured_once():
    net = network("resnet8", "frozen").train()
    x = torch.randn(32, 3, 16, 16)
    seen = []
    net.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    measure_once(net, x)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()(x + 1)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert seen[0].var(dim=(0, 2, 3)).sub(1).abs().max() < 0.02
    assert seen[1].mean(dim=(0, 2, 3)).abs().max() > 0.1, "other data has other statistics"


def test_nin_is_the_papers_at_full_width():
    convs = [m for m in network("nin", shape=(3, 32, 32), classes=10, width=1.0).modules() if isinstance(m, nn.Conv2d)]
    layers = [(c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0]) for c in convs]
    assert layers == [
        (192, 5, 1, 2), (160, 1, 1, 0), (96, 1, 1, 0), (192, 5, 1, 2), (192, 1, 1, 0),
        (192, 1, 1, 0), (192, 5, 1, 2), (192, 1, 1, 0), (10, 1, 1, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet20", 20), ("resnet8", 8), ("resnet110", 110), ("plain12", 12), ("plain5", 5), ("plain50", 50)],
)
def test_depth_counts_weighted_layers_on_the_longest_path(name, layers):
    modules = [m for key, m in network(name).named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "skip" not in key]
    assert len(modules) == layers


def test_resnet18_is_torchvisions_behind_another_stem():
    from torchvision.models import resnet18

    ours, theirs = network("resnet18", classes=10, width=1.0), resnet18(num_classes=10)
    shapes = [[tuple(p.shape) for p in net.parameters()] for net in (ours, theirs)]
    assert sorted(shapes[0][1:]) == sorted(shapes[1][1:])
    assert shapes[0][0] == (64, 3, 3, 3)
    assert ours.stages(torch.randn(1, 64, 16, 16)).shape == (1, 512, 2, 2)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (4, 9, 13)])
@pytest.mark.parametrize("name", NETS)
def test_any_image_size(name, shape):
    assert network(name, shape=shape)(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("channels", [1, 2, 3, 16, 48, 100, 192])
def test_groups_divide_the_channels_and_hold_two(channels):
    groups = normalizer("group").layer(channels, 2).num_groups
    assert channels % groups == 0
    assert channels // groups >= min(2, channels)
    assert groups <= 32


def test_linear_layers_have_a_bias_only_where_nothing_normalises():
    biases = {norm: [m.bias is not None for m in network("nin", norm) if isinstance(m, nn.Conv2d)] for norm in NORMALIZERS}
    unnormalised = {"none", "none-zero", "weight", "nf"}
    assert all(b == [norm in unnormalised] * 8 + [True] for norm, b in biases.items())


def test_unnormalised_network_keeps_the_signal_at_initialisation():
    net = network("plain12", "none", shape=(3, 32, 32), width=1.0)[:-3]
    z = net(torch.randn(8, 3, 32, 32))
    assert 0.1 < z.square().mean() < 10


@pytest.mark.parametrize(
    ("name", "norm", "shape", "message"),
    [
        ("resnet21", "batch", (3, 8, 8), "Did you mean .*resnet20"),
        ("nin3", "batch", (3, 8, 8), "Did you mean nin"),
        ("transformer", "batch", (3, 8, 8), "Choose one of nin"),
        ("nin", "batch", (64,), "--model mlp"),
        ("torchvision:resnet81", "batch", (3, 32, 32), "Did you mean resnet18"),
        ("torchvision:resnet18", "batch", (1, 32, 32), "timm:resnet18"),
        ("torchvision:resnet18", "group", (3, 32, 32), "can't be put into it"),
        ("timm:resnet81", "batch", (3, 32, 32), "Did you mean resnet18"),
        ("nosuchmodule:net", "batch", (3, 32, 32), "importable"),
        ("torch:nosuchfunction", "batch", (3, 32, 32), "importable"),
        ("builtins:dict", "batch", (3, 32, 32), "returned dict"),
    ],
)
def test_what_does_not_exist_or_fit_is_named(name, norm, shape, message):
    with pytest.raises(NormPropError, match=message):
        network(name, norm, shape, width=1.0)


def test_unknown_normaliser_and_width_are_named():
    with pytest.raises(NormPropError, match="Did you mean batch"):
        normalizer("batchnorm")
    with pytest.raises(NormPropError, match="no channels"):
        network("nin", width=0.0)
    with pytest.raises(NormPropError, match="Leave out --width"):
        network("timm:resnet18", width=0.5)


def test_networks_from_elsewhere(tmp_path, monkeypatch):
    timm_net = network("timm:resnet10t", shape=(1, 32, 32), width=1.0)
    assert timm_net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert network("torchvision:squeezenet1_1", width=1.0)(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n\ndef net(channels, classes):\n    return nn.Sequential(nn.Linear(channels, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(network("my_nets:net", width=1.0), nn.Sequential)
