"""What the experiments on tasks are made of: clients, targets, detectors, and networks to fine-tune."""

from __future__ import annotations

from collections import Counter

import federated
import finetune
import pytest
import reinforcement
import torch
from detection import NORMS, detector
from mabn import MovingAverageNorm
from rivals import with_normalizer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer


def test_clients_share_no_image_and_small_alphas_skew() -> None:
    labels = torch.arange(10).repeat_interleave(4000)
    skew = {}
    for alpha in (0.1, 100.0):
        parts = federated.shares(labels, alpha, 0)
        together = torch.cat(parts)
        assert len(together) == len(together.unique()) == federated.CLIENTS * federated.IMAGES
        skew[alpha] = sum(max(Counter(labels[part].tolist()).values()) for part in parts) / len(together)
    assert skew[100.0] < 0.2 < 0.5 < skew[0.1]


def test_the_server_takes_the_mean_of_statistics_too() -> None:
    torch.manual_seed(0)
    networks = [federated.network() for _ in range(3)]
    for number, network in enumerate(networks):
        network(torch.randn(4, 1, 28, 28) + number)
    mean = federated.averaged([network.state_dict() for network in networks])
    for key in ("0.weight", "1.running_mean"):
        values = [network.state_dict()[key] for network in networks]
        torch.testing.assert_close(mean[key], (values[0] + values[1] + values[2]) / 3)
    networks[0].load_state_dict(mean)


@pytest.mark.parametrize("norm", federated.NORMS)
def test_every_client_network_starts_and_trains(norm: str) -> None:
    torch.manual_seed(0)
    model = federated.start(norm, torch.randn(16, 1, 28, 28))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    federated.client(model, torch.randn(16, 1, 28, 28), torch.randint(10, (16,)), 0.03, 0.05)
    assert any(bool((value != before[key]).any()) for key, value in model.state_dict().items())
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_values_look_ahead_by_both_networks_and_not_past_a_failure() -> None:
    """By hand: the online network chooses action 1, the target network values it at 5."""
    online, target = (nn.Linear(1, 2) for _ in range(2))
    with torch.no_grad():
        for network, bias in ((online, (1.0, 2.0)), (target, (9.0, 5.0))):
            network.weight.zero_()
            network.bias.copy_(torch.tensor(bias))
    states = torch.zeros(2, 1)
    batch = reinforcement.Transitions(states, torch.tensor([0, 1]), torch.ones(2), states, torch.tensor([0.0, 1.0]))
    found = reinforcement.targets(online, target, batch)
    torch.testing.assert_close(found, torch.tensor([1 + 5 * reinforcement.DISCOUNT, 1.0]))


def test_the_memory_gives_what_was_put_in() -> None:
    memory = reinforcement.Memory(10, 2)
    for number in range(4):
        memory.add([number, 2 * number], number % 2, 1.0, [number + 1, 0], float(number == 3))
    batch = memory.sample(200)
    assert set(batch.state[:, 0].tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(batch.state[:, 1], 2 * batch.state[:, 0])
    torch.testing.assert_close(batch.failed, (batch.state[:, 0] == 3).float())


@pytest.mark.parametrize("name", reinforcement.CRITICS)
def test_a_critic_learns_from_its_memory(name: str) -> None:
    torch.manual_seed(0)
    memory = reinforcement.Memory(100, 4)
    for _ in range(100):
        memory.add(torch.randn(4), 0, 1.0, torch.randn(4), 1.0)
    learner = reinforcement.Learner(name, 1e-2, 0.0, memory)
    for _ in range(60):
        learner.update()
    with torch.no_grad():
        values = learner.model.eval()(memory.kept.state)[:, 0]
    assert abs(float(values.mean()) - 1) < 0.3  # all episodes fail at once: every value is the reward


@pytest.mark.parametrize("norm", NORMS)
def test_a_detector_trains_on_one_image(norm: str) -> None:
    torch.manual_seed(0)
    samples = torch.randn(2, 3, 96, 96)
    model = detector(norm, samples).train()
    assert norm == "batch" or not any(type(m) is nn.BatchNorm2d for m in model.modules())
    target = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0]]), "labels": torch.tensor([2])}
    sum(model([samples[0]], [target]).values()).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)


def test_moving_averages_take_the_place_of_every_batchnorm_behind_centred_filters() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    model = with_normalizer(network, "mabn", torch.randn(4, 3, 8, 8))
    assert isinstance(model[1], MovingAverageNorm)
    assert model[0].weight.sum((1, 2, 3)).abs().max() < 1e-5


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = build("resnet8", shape=(3, 16, 16), classes=5, norm=normalizer("batch"), width=0.25)
    for _ in range(5):
        model.train()(torch.randn(16, 3, 16, 16))
    return model


def test_a_converted_network_begins_with_the_trained_features(trained: nn.Module) -> None:
    x = torch.randn(8, 3, 16, 16)
    features = {}
    for name in ("converted", "BatchNorm", "measured"):
        model = finetune.prepared(trained, name, x).eval()
        model.fc = nn.Identity()
        features[name] = model(x)
    torch.testing.assert_close(features["converted"], features["BatchNorm"], rtol=1e-3, atol=1e-4)
    assert (features["measured"] - features["BatchNorm"]).abs().max() > 0.01


def test_frozen_statistics_stay_and_measured_ones_are_those_of_the_samples(trained: nn.Module) -> None:
    samples = 3 + 2 * torch.randn(128, 3, 16, 16)
    models = {name: finetune.prepared(trained, name, samples) for name in ("frozen", "measured")}
    before = first_norm(models["frozen"]).running_mean.clone()
    models["frozen"](samples)
    torch.testing.assert_close(first_norm(models["frozen"]).running_mean, before, rtol=0, atol=0)
    with torch.no_grad():
        outputs = trained.get_submodule("conv")(samples)
    torch.testing.assert_close(first_norm(models["measured"]).running_mean, outputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


def first_norm(model: nn.Module) -> _BatchNorm:
    return next(m for m in model.modules() if isinstance(m, _BatchNorm))
