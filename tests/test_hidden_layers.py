"""Predicted against measured layer by layer, and Proposition 1 on data for which its assumption holds or doesn't."""

import copy
import math

import pytest
import torch
from torch import nn

import normprop
from normprop.errors import NormPropError
from normprop.inspection.hidden_layers import hidden_layers
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer, realize


def network(norm, seed=0):
    torch.manual_seed(seed)
    chosen = normalizer(norm)
    return realize(build("nin", shape=(3, 8, 8), classes=4, norm=chosen, width=0.08), chosen, (3, 8, 8))


@pytest.mark.parametrize("norm", ["paper", "normprop", "batch", "none"])
def test_every_hidden_layer_of_the_papers_network_is_found_and_nothing_changes(norm):
    model = network(norm)
    model.train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(40, 3, 8, 8)
    layers = hidden_layers(model, x, batch_size=16)
    assert len(layers) == 8
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    together = hidden_layers(model, x, batch_size=40)
    for a, b in zip(layers, together, strict=True):
        assert a.deviation == pytest.approx(b.deviation, rel=1e-5)
        assert a.preactivation.unit_mean == pytest.approx(b.preactivation.unit_mean, abs=1e-5)


@pytest.mark.parametrize("norm", ["paper", "normprop", "none"])
def test_what_is_measured_is_what_the_network_computes(norm):
    """The first hidden layer by hand: a forward hook on its activation."""
    model, x = network(norm).eval(), torch.randn(64, 3, 8, 8)
    seen = []
    model.get_submodule("2").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double()))
    with torch.no_grad():
        model(x)
    units = seen[0].transpose(0, 1).flatten(1)
    layer = hidden_layers(model, x)[0]
    assert layer.preactivation.unit_mean == pytest.approx(float(units[0].mean()), abs=1e-6)
    assert layer.preactivation.mean_size == pytest.approx(float(units.mean(1).abs().mean()), abs=1e-6)
    assert layer.preactivation.std == pytest.approx(float(units.var(1, correction=0).mean().sqrt()), rel=1e-5)
    off = torch.corrcoef(units) - torch.eye(len(units))
    assert layer.correlation == pytest.approx(float(off.norm()) / math.sqrt(len(units)), rel=1e-5)
    report = normprop.propagate(model)
    predicted = next(row for row in report if row.path == "2")
    row = report[list(report).index(predicted) - 1].predicted.var.detach().double().flatten().expand(len(units))
    expected = (torch.cov(units, correction=0) - row.diag()).norm() / row.norm()
    assert layer.deviation == pytest.approx(float(expected), rel=1e-5)


def test_proposition_1_with_uncorrelated_inputs():
    """Measured correlations are the cosines between filters, and what is neglected stays below the bound."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 2))
    [layer] = hidden_layers(net, torch.randn(200_000, 12), batch_size=50_000)
    weight = net[0].weight.detach().double()
    cosines = torch.corrcoef(torch.cat([weight, -weight], 1)) - torch.eye(6)
    assert layer.coherence == pytest.approx(float(cosines.abs().max()), rel=1e-6)
    assert layer.error == pytest.approx(float(cosines.norm()) / math.sqrt(6), rel=1e-6)
    assert layer.bound == pytest.approx(layer.coherence * math.sqrt(5), rel=1e-6)
    assert layer.error <= layer.bound
    assert layer.correlation == pytest.approx(layer.error, abs=0.01)


def test_correlated_inputs_break_the_bound():
    """All inputs are one number: filters at right angles, units that say the same."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    nn.init.eye_(net[0].weight)
    [layer] = hidden_layers(net, torch.randn(1000, 1).expand(1000, 4))
    assert layer.bound == 0
    assert layer.correlation == pytest.approx(math.sqrt(3), rel=1e-5)


def test_the_filters_of_a_converted_layer_are_those_it_computes_with():
    """Exact mode centres its filters: cosines are taken after that."""
    model = network("normprop")
    rows = model.get_submodule("0").weight.detach().double().flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True)
    cosines = (rows @ rows.T).fill_diagonal_(0)
    assert hidden_layers(model, torch.randn(8, 3, 8, 8))[0].coherence == pytest.approx(float(cosines.abs().max()), rel=1e-5)


def test_branches_are_refused():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.relu(self.a(x)) + self.b(x).relu()

    with pytest.raises(NormPropError, match="told apart in chains"):
        hidden_layers(Residual(), torch.randn(10, 4))
