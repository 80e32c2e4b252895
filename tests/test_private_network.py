"""Private training of effective tensors: Opacus' own hooks, and the way back through the lane."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import normprop
from normprop import NormPropError
from tests.zoo import SMALL, Gated, PreActivation, Residual, outputs, randomise, without_dropout

pytestmark = [
    # Opacus sets backward hooks on a module whose input needs no gradient, and torch says so.
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]
opacus = pytest.importorskip("opacus")
integration = pytest.importorskip("normprop.integrations.opacus")
dp_optimizers = pytest.importorskip("opacus.optimizers")
memory = pytest.importorskip("opacus.utils.batch_memory_manager")

HELD = sorted(SMALL.keys() - {"shared"})  # the one network with a layer that is called twice
HUGE = 1e12


class InPlace(nn.Module):
    """As torchvision writes residual blocks: ``out += skip``, activations in place, and a layer without a normaliser."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 6, 1), nn.ReLU(inplace=True)
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.head(self.relu(out).mean((2, 3)))


def loss_of(output: Any) -> Tensor:
    """A mean over samples of something smooth."""
    return outputs(output)[0].flatten(1).square().sum(1).mean()


def converted(make: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return normprop.convert(without_dropout(randomise(make()).double())).train()


def step(model: nn.Module, *batches: Tensor, clip: float = HUGE, noise: float = 0.0, **options: Any) -> dict[str, Tensor]:
    """The gradients that a step of SGD finds after batches of which all but the last are virtual."""
    private = integration.PrivateNetwork(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    dp = dp_optimizers.DPOptimizer(
        private.optimizer(inner),
        noise_multiplier=noise,
        max_grad_norm=clip,
        expected_batch_size=sum(map(len, batches)),
        **options,
    )
    sampled = opacus.GradSampleModule(private)
    for i, x in enumerate(batches):
        dp.signal_skip_step(do_skip=i + 1 < len(batches))
        dp.zero_grad()
        loss_of(sampled(x)).backward()
        dp.step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ordinary(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean by autograd through the converted network itself."""
    model.zero_grad()
    loss_of(model(x)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", HELD)
def test_without_clipping_and_noise_it_is_the_ordinary_gradient(name: str) -> None:
    make, shape = SMALL[name]
    model = converted(make)
    x = torch.randn(4, *shape, dtype=torch.float64)
    assert_same(step(model, x), ordinary(model, x))


@pytest.mark.parametrize("make", [InPlace, lambda: nn.Sequential(nn.Sequential(InPlace(), nn.Identity()), nn.Tanh())])
def test_networks_that_write_in_place_are_taken_as_they_are(make: Any) -> None:
    model = converted(make)
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    assert_same(step(model, x), ordinary(model, x))


def test_a_part_may_be_converted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), nn.Tanh(), nn.Linear(5, 3)).double().train()
    model[0] = normprop.convert(model[0])
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert_same(step(model, x), ordinary(model, x))


@pytest.mark.parametrize("make", [Residual, PreActivation, Gated])
def test_clipping_acts_on_effective_gradients_of_each_sample(make: Any) -> None:
    """A slow loop over samples, and the Jacobian of what the lane computes by autograd."""
    model = converted(make)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    private = integration.PrivateNetwork(model)
    private(x)
    plain, tensors = private.tensors.plain, private.tensors
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    per_sample = []
    for one in x.split(1):
        gradients = torch.autograd.grad(loss_of(plain(one)), list(trained.values()))
        per_sample.append(dict(zip(trained, gradients, strict=True)))
    lengths = [math.sqrt(sum(float(g.square().sum()) for g in sample.values())) for sample in per_sample]
    clip = sum(sorted(lengths)[1:3]) / 2  # two samples are longer
    factors = [min(1.0, clip / (length + 1e-6)) for length in lengths]
    mean = {n: sum(f * s[n] for f, s in zip(factors, per_sample, strict=True)) / len(x) for n in trained}
    (part,) = tensors.parts
    values = part.lane.evaluate(part.root, part.entries)
    flat, given = [], []
    for entry, leaves in zip(part.entries, part.leaves, strict=True):
        scale = values[entry.key]
        sources = (scale.weight if entry.layer else scale.factor), scale.offset
        for leaf, source in zip(leaves, sources, strict=True):
            flat.append(source)
            given.append(mean[next(n for n, p in trained.items() if p is leaf)])
    behind = [p for p in model.parameters() if p.requires_grad]
    back = torch.autograd.grad(flat, behind, given, allow_unused=True)
    direct = {id(p): mean[n] for n, p in trained.items()}
    expected = {
        name: (0 if b is None else b) + direct.get(id(p), 0)
        for (name, p), b in zip(((n, p) for n, p in model.named_parameters() if p.requires_grad), back, strict=True)
    }
    found = step(model, x, clip=clip)
    assert_same(found, expected)
    assert any(not torch.allclose(found[name], g, rtol=1e-7, atol=0.0) for name, g in step(model, x).items())


def test_samples_sent_back_one_by_one_are_those_of_torch_func() -> None:
    model = converted(Residual)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    theta = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    one = lambda p, sample: loss_of(functional_call(model, p, (sample[None],)))
    samples = vmap(grad(one), in_dims=(None, 0))(theta, x)
    for i in range(len(x)):
        assert_same(step(model, x[i : i + 1]), {name: g[i] for name, g in samples.items()})


def test_a_sample_does_not_see_its_batch() -> None:
    model = converted(PreActivation)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    private = opacus.GradSampleModule(integration.PrivateNetwork(model))
    found = []
    for batch in (x, x[1:3]):
        loss_of(private(batch)).backward()
        found.append([p.grad_sample.clone() for p in private.parameters() if p.requires_grad])
        private.zero_grad()
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(whole[1:3], part, rtol=1e-9, atol=1e-12)


def test_virtual_batches_add_up() -> None:
    model = converted(Residual)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    assert_same(step(model, x[:2], x[2:]), step(model, x))
    clipped = step(model, x, clip=0.01)
    assert_same(step(model, x[:2], x[2:], clip=0.01), clipped)


def test_an_empty_batch_is_a_step_of_noise() -> None:
    model = converted(InPlace)
    nothing = torch.zeros(0, 3, 6, 6, dtype=torch.float64)
    private = integration.PrivateNetwork(model)
    dp = dp_optimizers.DPOptimizer(
        private.optimizer(torch.optim.SGD(model.parameters(), lr=0.0)),
        noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    opacus.GradSampleModule(private)(nothing).sum().backward()
    dp.step()
    generator, leaves = torch.Generator().manual_seed(1), {id(leaf) for leaf in private.tensors.leaves}
    for p in (p for p in private.parameters() if p.requires_grad):
        noise = torch.normal(0.0, 1.0, p.shape, generator=generator, dtype=p.dtype)
        if id(p) in leaves:  # what layers without a site read gains what the lane sends back
            torch.testing.assert_close(p.grad, noise)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)
    assert float(model.conv1.weight.grad.norm()) > 0


def test_noise_goes_back_through_the_lane() -> None:
    """Its covariance in θ is σ² JᵀJ: none in the means of centred filters, none along a filter."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).double()
    model = normprop.convert(net, example=torch.randn(1, 3, 6, 6, dtype=torch.float64)).train()
    found = step(model, torch.randn(2, 3, 6, 6, dtype=torch.float64), noise=1.0, clip=1.0)["0.weight"]
    weight = model[0].weight
    assert model[1].center
    torch.testing.assert_close(found.flatten(1).sum(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close((found * weight).flatten(1).sum(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float(found.abs().min()) > 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("by_epsilon", [False, True])
def test_the_engine_trains_the_network_itself(kind: Any, by_epsilon: bool) -> None:
    torch.manual_seed(0)
    model = normprop.convert(Residual()).train()
    before = copy.deepcopy(model.state_dict())
    private = integration.PrivateNetwork(model)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    inner = kind([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=0.01)
    data = torch.utils.data.TensorDataset(torch.randn(24, 3, 8, 8), torch.randint(5, (24,)))
    engine = opacus.PrivacyEngine(accountant="rdp")
    common = {
        "module": private, "optimizer": private.optimizer(inner), "max_grad_norm": 1.0,
        "data_loader": torch.utils.data.DataLoader(data, batch_size=8),
    }  # fmt: skip
    if by_epsilon:
        sampled, optimizer, loader = engine.make_private_with_epsilon(
            **common, target_epsilon=5.0, target_delta=1e-3, epochs=2
        )
    else:
        sampled, optimizer, loader = engine.make_private(**common, noise_multiplier=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    steps = 0
    for _ in range(2):
        with memory.BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
            for x, y in parts:
                optimizer.zero_grad()
                nn.functional.cross_entropy(sampled(x), y).backward()
                optimizer.step()
                assert len(x) <= 3
        steps += len(loader)
        schedule.step()
    assert sum(count for *_, count in engine.accountant.history) == steps == 6
    assert 0 < engine.get_epsilon(1e-3) <= (5.0 if by_epsilon else 100.0)
    assert [group["lr"] for group in inner.param_groups] == [0.01 / 4] * 2
    assert inner.state_dict()["param_groups"][0]["weight_decay"] == 0.1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) is not model.get_parameter(name).requires_grad, name
    assert sampled.state_dict().keys() == {f"_module.{name}" for name in before}
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(sampled.eval()(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(sampled.train()(x), model(x), rtol=1e-4, atol=1e-5)


def test_ghost_clipping_finds_the_same() -> None:
    model = converted(PreActivation)
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    data = torch.utils.data.TensorDataset(x, y)
    found = []
    for mode in ("hooks", "ghost"):
        private = integration.PrivateNetwork(model)
        made = opacus.PrivacyEngine().make_private(
            module=private, optimizer=private.optimizer(torch.optim.SGD(model.parameters(), lr=0.0)),
            data_loader=torch.utils.data.DataLoader(data, batch_size=4), noise_multiplier=0.0, max_grad_norm=0.05,
            poisson_sampling=False, grad_sample_mode=mode,
        )  # fmt: skip
        sampled, optimizer = made[:2]
        criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
        optimizer.zero_grad()
        criterion(sampled(x), y).backward()
        optimizer.step()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-7, atol=1e-10)


def test_frozen_parameters_stay_and_dropout_works() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 6, 3, padding="same"), nn.BatchNorm1d(6), nn.SiLU(), nn.Dropout(0.5),
        nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip
    model = normprop.convert(net.double(), example=torch.randn(1, 2, 8, dtype=torch.float64)).train()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    frozen = copy.deepcopy(model[0].weight)
    private = integration.PrivateNetwork(model)
    assert not any(p.requires_grad for p in private.tensors.plain[0].parameters())
    gradients = step(model, torch.randn(3, 2, 8, dtype=torch.float64), clip=1.0, noise=1.0)
    assert gradients.keys() == {"4.weight", "5.weight", "5.bias", "8.weight", "8.bias"}
    assert torch.equal(model[0].weight, frozen)
    model[1].requires_grad_(True)
    with pytest.raises(NormPropError, match="frozen or unfrozen"):
        private(torch.randn(3, 2, 8, dtype=torch.float64))


def test_what_cannot_be_held_is_refused_by_name() -> None:
    model = converted(SMALL["shared"][0])
    with pytest.raises(NormPropError, match="conv is called 2 times"):
        integration.PrivateNetwork(model)
    model = converted(Residual)
    model.conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(NormPropError, match="between conv1 and bn1"):
        integration.PrivateNetwork(model)
    with pytest.raises(NormPropError, match="paper"):
        integration.PrivateNetwork(normprop.convert(Residual(), method="paper"))
    with pytest.raises(NormPropError, match="no converted network"):
        integration.PrivateNetwork(Residual())
    with pytest.raises(NormPropError, match="no trainable parameter"):
        integration.PrivateNetwork(converted(Residual).requires_grad_(False))


def test_wrong_optimizers_are_refused() -> None:
    model = converted(InPlace)
    private = integration.PrivateNetwork(model)
    with pytest.raises(NormPropError, match="no parameters of the network"):
        private.optimizer(torch.optim.SGD(private.parameters(), lr=0.1))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = private.optimizer(inner)
    with pytest.raises(NormPropError, match="wrapped already"):
        private.optimizer(optimizer)
    with pytest.raises(NormPropError, match="no forward has run"):
        optimizer.step()
    with pytest.raises(NormPropError, match="can't be added"):
        optimizer.add_param_group({"params": []})
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    private(x).sum().backward()
    torch.optim.SGD(private.parameters(), lr=0.1).step()
    with pytest.raises(NormPropError, match="something else has changed"):
        private(x)


def test_copies_and_checkpoints() -> None:
    model = converted(Residual)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    private = integration.PrivateNetwork(model)
    expected = private(x)
    twin = copy.deepcopy(private)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.network.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    assert not torch.allclose(twin(x), expected)
    assert (
        not opacus.GradSampleModule(twin)
        .load_state_dict({f"_module.{name}": value for name, value in private.state_dict().items()})
        .missing_keys
    )
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        twin.load_state_dict(private.state_dict() | {"nonsense": x})
    with pytest.raises(RuntimeError, match="size mismatch"):
        twin.load_state_dict(private.state_dict() | {"conv1.weight": x})
    assert {p.dtype for p in private.float().parameters()} == {torch.float32}
    assert private(x.float()).dtype is torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_user_hooks_on_normalisers_fire() -> None:
    net, seen = InPlace(), []
    net.bn1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    private = integration.PrivateNetwork(normprop.convert(net).train())
    seen.clear()
    private(torch.randn(2, 3, 6, 6))
    assert seen == [torch.Size([2, 6, 6, 6])]
