"""The ablations do what their tables say they do."""

import copy

import ablations
import pytest
import torch
from group_noise import GroupNoise
from torch.nn import functional as F
from treatments import BatchNoise, BranchGain, GainDecay, Uncentred, learned_proxies, projected

import normprop
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer, realize
from normprop.lab.pages.marked_page import filled
from normprop.sites.site import Site

SHAPE = (3, 8, 8)


@pytest.fixture
def network():
    torch.manual_seed(0)
    norm = normalizer("normprop")
    return realize(build("resnet8", shape=SHAPE, classes=4, norm=norm, width=0.25), norm, SHAPE)


@pytest.fixture
def optimizer(network):
    return torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def step(network, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(network.train()(torch.randn(4, *SHAPE)), torch.arange(4)).backward()
    optimizer.step()


def filter_means(network, path):
    return normprop.fold(network).get_submodule(path).weight.mean((1, 2, 3)).abs().max()


def test_recipes_are_distinct_and_can_be_followed():
    for study in ablations.STUDIES.values():
        runs = study.runs()
        assert len(set(runs)) == len(runs) == len(study.variants) * len(study.columns) * len(study.seeds)
        assert {treat for treat, _ in runs} <= set(ablations.TREATMENTS)


def test_chosen_layers_keep_their_mean(network, optimizer):
    paths = ("conv", "stages.1.0.skip.0")
    assert all(filter_means(network, path) < 1e-6 for path in paths)
    Uncentred(("conv",))(network, optimizer)
    assert filter_means(network, "conv") > 0.01
    assert filter_means(network, "stages.1.0.skip.0") < 1e-6
    Uncentred()(network, optimizer)
    assert filter_means(network, "stages.1.0.skip.0") > 0.01


def test_the_layers_of_the_tables_exist(network, optimizer):
    for treat in ablations.TREATMENTS.values():
        if isinstance(treat, Uncentred) and treat.layers:
            assert all(network.get_submodule(path).weight.dim() == 4 for path in treat.layers)


def test_branches_of_gain_0_do_nothing(network, optimizer):
    x = torch.randn(2, *SHAPE)
    BranchGain(0.0)(network, optimizer)
    before = network(x)
    with torch.no_grad():
        network.stages[0][0].conv1.weight.neg_()
    assert torch.allclose(network(x), before, atol=1e-5)
    BranchGain()(network, optimizer)
    assert torch.allclose(network.stages[0][0].norm2.weight, torch.tensor(3**-0.5))


def test_projected_filters_stay_at_unit_length(network, optimizer):
    projected(network, optimizer)
    step(network, optimizer)
    assert torch.allclose(network.conv.weight.flatten(1).norm(dim=1), torch.tensor(1.0))


def test_proxies_start_at_nothing_and_learn(network, optimizer):
    x = torch.randn(2, *SHAPE)
    before = network(x)
    learned_proxies(network, optimizer)
    assert torch.allclose(network(x), before, atol=1e-6)
    step(network, optimizer)
    proxies = [p for name, p in network.named_parameters() if name.startswith("proxy")]
    assert len(proxies) == 2 * (9 - 2)  # nothing reads the moments of the two sites before the last sum
    assert max(float(p.detach().abs().max()) for p in proxies) > 1e-4


def test_noise_is_that_of_a_batch_in_training_alone(network, optimizer):
    x = torch.randn(2, *SHAPE)
    before = network.eval()(x)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    BatchNoise(64)(network, optimizer)
    assert torch.equal(network(x), before)
    draws = torch.stack([network.train()(x) for _ in range(2)]).detach()
    assert not torch.allclose(draws[0], draws[1])
    optimizer.step()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_noise_follows_its_law():
    torch.manual_seed(0)
    site = Site(None, None, torch.zeros(20_000), torch.full((20_000,), 4.0))
    BatchNoise(65).disturb(site)
    assert float(site.shift.std()) == pytest.approx(2 / 65**0.5, rel=0.03)
    assert float(site.scale.mean()) == pytest.approx(4.0, rel=0.01)
    assert float(site.scale.std()) == pytest.approx(4 * (2 / 64) ** 0.5, rel=0.03)


def test_a_group_s_statistics_are_those_of_calibration_on_it(network, optimizer):
    torch.manual_seed(0)
    network.double()
    x = torch.randn(32, *SHAPE, dtype=torch.float64)
    normprop.calibrate(network, x, directions=0)
    clean = {name: value.clone() for name, value in network.state_dict().items()}
    expected = [normprop.calibrate(copy.deepcopy(network), part, directions=0).train()(x) for part in x.split(16)]
    GroupNoise(16, groups=2, draw=lambda _, count: x[:count])(network, optimizer)
    seen = set()
    for _ in range(16):
        found = network.train()(x)
        near = [bool(torch.allclose(found, one, rtol=1e-9, atol=1e-9)) for one in expected]
        assert sum(near) == 1
        seen.add(near.index(True))
    assert seen == {0, 1}
    torch.testing.assert_close(network.eval()(x), normprop.calibrate(copy.deepcopy(network), x, directions=0)(x))
    network.train()(x)
    optimizer.step()  # without gradients
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, clean[name], rtol=1e-12, atol=1e-12)


def test_gains_decay_as_their_penalty_says():
    """The penalty's gradient, taken by autograd, is what is added; nothing else is touched."""
    norm = normalizer("normprop")
    networks = []
    for size in (None, 16):
        torch.manual_seed(0)
        network = realize(build("resnet8", shape=SHAPE, classes=4, norm=norm, width=0.25), norm, SHAPE)
        sgd = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
        if size:
            GainDecay(size)(network, sgd)
        torch.manual_seed(1)
        loss = F.cross_entropy(network.train()(torch.randn(4, *SHAPE)), torch.arange(4))
        if not size:
            gains = [m.weight for m in network.modules() if isinstance(m, Site)]
            loss = loss + sum(gain.square().sum() for gain in gains) / (2 * 16) / 2
        loss.backward()
        sgd.step()
        networks.append(network)
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(a, b)


def test_a_page_is_filled_between_its_marks():
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n"
    new = filled(page, {"one": "new"})
    assert new == "a\n<!-- one -->\n\nnew\n\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n"
