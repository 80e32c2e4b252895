"""Per-sample gradients and training under differential privacy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop import NormPropError
from tests.zoo import SMALL, Residual, mlp, outputs, randomise, without_dropout

pytestmark = [
    # Opacus sets backward hooks on a module whose input needs no gradient, and torch says so.
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]
opacus = pytest.importorskip("opacus")
integration = pytest.importorskip("normprop.integrations.opacus")


def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """A backward a sample."""
    found: dict[str, list[Tensor]] = {}
    for i in range(len(x)):
        model.zero_grad()
        nn.functional.cross_entropy(outputs(model(x[i : i + 1]))[0], y[i : i + 1]).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                found.setdefault(name, []).append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    model.zero_grad()
    return {name: torch.stack(gradients) for name, gradients in found.items()}


@pytest.mark.parametrize("name", ["residual", "pre-activation", "gated", "mlp", "sequence"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_each_sample(name: str, reduction: str) -> None:
    make, shape = SMALL[name]
    torch.manual_seed(0)
    model = normprop.convert(without_dropout(randomise(make()).double()))
    x, y = torch.randn(4, *shape, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    expected = one_by_one(model, x, y)
    whole = integration.WholeNetwork(model)
    wrapped = opacus.GradSampleModule(whole, loss_reduction=reduction)
    nn.functional.cross_entropy(wrapped(x), y, reduction=reduction).backward()
    for path, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(path).grad_sample, gradient, rtol=1e-8, atol=1e-10, msg=path)


@pytest.mark.parametrize("affine", [True, False])
def test_without_it_opacus_is_refused(affine: bool) -> None:
    """Its hooks on layers would take the gradients of effective weights for those of the parameters."""
    model = normprop.convert(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, affine=affine), nn.ReLU(), nn.Linear(8, 2)))
    bare = opacus.GradSampleModule(model)
    with pytest.raises(NormPropError, match="WholeNetwork"):
        bare(torch.randn(3, 4))


def test_the_engine_trains_the_network_itself() -> None:
    torch.manual_seed(0)
    model = normprop.convert(Residual()).train()
    before = copy.deepcopy(model.state_dict())
    whole = integration.WholeNetwork(model)
    data = torch.utils.data.TensorDataset(torch.randn(24, 3, 8, 8), torch.randint(5, (24,)))
    engine = opacus.PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=whole,
        optimizer=torch.optim.SGD(whole.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
    assert 0 < engine.get_epsilon(1e-5) < 100
    for name, value in model.state_dict().items():
        trainable = model.get_parameter(name).requires_grad
        assert torch.equal(value, before[name]) is not trainable, name
    assert model.state_dict().keys() == before.keys()


def test_mode_and_type_reach_the_network() -> None:
    model = normprop.convert(Residual())
    whole = integration.WholeNetwork(model.eval())
    assert not whole.training
    assert whole.train().network.training
    assert {p.dtype for p in whole.double().network.parameters()} == {torch.float64}
    assert dict(whole.named_parameters())["conv1/weight"] is model.get_parameter("conv1.weight")


def test_dropout_and_frozen_networks_are_refused() -> None:
    model = normprop.convert(mlp()).train()
    whole = integration.WholeNetwork(model)
    with pytest.raises(NormPropError, match="4 drops at random"):
        whole(torch.randn(2, 3, 4, 4))
    assert whole.eval()(torch.randn(2, 3, 4, 4)).shape == (2, 3)
    with pytest.raises(NormPropError, match="no trainable parameter"):
        integration.WholeNetwork(model.requires_grad_(False))
